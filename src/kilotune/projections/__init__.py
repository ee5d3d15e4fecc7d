"""The frozen random matrices, the same bits on every machine: docs/projections.md defines them.

matrices.py makes and holds VeRA's A and B; streams.py draws signs, permutations and indices for the other methods.
Imports errors.py only. Begin in matrices.py.
"""
