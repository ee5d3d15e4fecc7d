"""Methods compared on one problem, each with its own learning-rate search of an equal budget. See docs/compare.md."""
