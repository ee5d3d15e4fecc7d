"""Two image tasks for the experiments: scikit-learn's digits and CIFAR-10, a small network, and its training.

Uses the library only. Begin in tasks.py.
"""
