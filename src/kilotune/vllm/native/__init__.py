"""The parts that are classes of vLLM's own kind; to be imported where vLLM is.

Uses the other files of vllm/, never the other way round but for plugin.py. Begin in manager.py.
"""
