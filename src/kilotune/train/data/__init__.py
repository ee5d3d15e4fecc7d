"""From files to batches: rows are read, split, checked by column, tokenised, packed, and put together.

Uses settings/ only; knows nothing of models. A JSONL line is read in readers.py: begin there.
"""
