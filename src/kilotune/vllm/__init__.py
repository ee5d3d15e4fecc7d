"""VeRA inside vLLM: a plugin that serves thousands of adapters over one base at the base's own speed (docs/vllm.md).

Nothing in here needs vLLM but ``native/``, which subclasses its classes and is imported only inside vLLM's processes.
Stands on fleet/store/ and below; begin in plugin.py.
"""
