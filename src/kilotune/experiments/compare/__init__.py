"""Methods compared on one problem, each with its own learning-rate search of an equal budget. See docs/compare.md.

Uses images/ and run_store.py, and train/ for recipes of `kilotune train`. Begin in runner.py; a problem of one's own is
what problem.py says.
"""
