"""Thousands of adapters on the model's device, a row of numbers each, for batches that mix them.

Stands on model/ and below; nothing of store/ or joint/ is used. Begin in adapter_bank.py; forms.py says what the
adapters of one bank have in common (their *form*: method, configuration and layers).
"""
