"""The intrinsic dimension of a task: how few trained numbers reach 90 % of full training's score.

Uses images/ and run_store.py. Begin in search.py. See docs/intrinsic-dimension.md.
"""
