"""A fine-tuning about to run: base loaded, adapter put in, plan, memory; and what is told while it runs.

Uses trainer/, tasks/ and below. Begin in session.py.
"""
