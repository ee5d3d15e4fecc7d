"""The HTTP service: OpenAI's API over an engine, and the management of its adapters."""
