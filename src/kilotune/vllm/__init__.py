"""VeRA inside vLLM: a plugin that serves thousands of adapters over one base at the base's own speed (docs/vllm.md).

Nothing in here needs vLLM but ``native/``, which subclasses its classes and is imported only inside vLLM's processes.
Stands on fleet/store/ and below; begin in plugin.py.

::

    settings.py          what additional_config={"kilotune": {...}} says
    layout.py            the numbers of an adapter as one row; what of it a worker of several keeps
    row_files.py         row files, named by their content; a worker's own copies, which nobody can take away
    arena.py             a row for each slot on the device; which token takes which; the mathematics
    base_fingerprint.py  the base's fingerprint, from its files
    admission.py         whether an adapter of a store may be served, and its row
    worker_status.py     what workers tell the resolver: that they are active, and what they can serve
    adapter_source.py    a request's model name -> a validated row file
    gate.py              the server's middleware: no answer without the plugin, nor from an adapter that was lost
    plugin.py            the entry point, and the version guard
    native/              the parts that are vLLM's own classes
"""
