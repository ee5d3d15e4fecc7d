"""Thousands of fine-tunes over one base model, answered in one batch, over HTTP."""
