"""PEFT's own tests, run on ``kilotune.peft``: what ``scripts/peft_own_tests.py`` and its pytest plugin are made of.

Nothing of PEFT is kept in this repository but the names of its tests (``tests/peft_own/``).
"""
