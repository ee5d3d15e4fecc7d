"""The HTTP service: OpenAI's API over an engine, and the management of its adapters.

Knows nothing of models; asks engine/ through interface.py. Begin in app.py (the routes), or in startup.py (what the
command line builds).
"""
