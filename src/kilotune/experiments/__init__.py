"""What `kilotune demo`, `experiment`, `compare` and `intrinsic-dimension` run: what shows what the library does.

Each is a room of its own; images/ has the data, network and training that they share. Stands on everything but the
command line. Begin in people/experiment.py.
"""
