"""What answers requests: batches that mix adapters, sampling, adapters in memory and on the device.

Knows nothing of HTTP; stands on fleet/ and model/. Begin in interface.py, then continuous_batching.py for language
models or encoders.py; a token is chosen in sampling.py.
"""
