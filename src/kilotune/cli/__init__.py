"""The command line: one verb a file, registered in :mod:`kilotune.cli.main`.

May use everything. A verb imports what needs torch inside its function, so that help and wrong arguments answer at
once. Files with an underscore are what the verbs share. Begin in _app.py.
"""
