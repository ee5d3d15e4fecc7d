"""Functions on tensors: the frozen-factor products of VeRA and LoRA, rows of many adapters, Hadamard transforms.

No modules, no configs; imports errors.py and projections/ only. Begin in lowrank.py: its docstring has the
derivation.
"""
