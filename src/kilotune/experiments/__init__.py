"""What `kilotune experiment`, `compare` and `intrinsic-dimension` run: experiments that show what the library does.

Each is a room of its own; images/ has the data, network and training that they share. Stands on everything but the
command line. Begin in cnn/experiment.py.
"""
