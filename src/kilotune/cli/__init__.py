"""The command line: one verb a file, registered in :mod:`kilotune.cli.main`."""
