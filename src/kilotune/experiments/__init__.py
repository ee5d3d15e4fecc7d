"""Experiments that show what the library does: the tutorials' network (``kilotune demo``)."""
