"""Adapters in training, in small operations: forward, backward, a step of the optimizer; many mixed in one pass.

mixed_pass.py runs rows of many adapters at once, adapter_rows.py holds their numbers. joint/ trains users with it to
their end, stepper.py does what it is told, operation by operation. Begin in mixed_pass.py.
"""
