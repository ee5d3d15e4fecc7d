"""What uses a finished training: text from a model with an adapter, and exports for other tools.

Uses running/ (to load the base) and below. Begin in text_generation.py.
"""
