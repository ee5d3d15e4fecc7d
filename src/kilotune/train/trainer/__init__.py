"""transformers' Trainer with our methods: built, sharded over processes, stopped, its failures told, its folder kept.

What touches transformers' internals is here. Uses tasks/ and settings/. Begin in from_settings.py.
"""
