"""The model with adapters in it: :func:`get_peft_model` and :class:`PeftModel`, and what these are made of.

peft_model.py puts together injection/, adapter_files/, merging.py and routed_model.py (which row of a batch goes to
which adapter). Begin in peft_model.py.
"""
