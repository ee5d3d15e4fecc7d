"""Adapters into a model and out of it: which modules are taken and why, the wrappers around them.

Stands on layers/ and below; reads and writes no files. Begin in inject.py; targets.py says which modules match.
"""
