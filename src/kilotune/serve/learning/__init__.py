"""Adapters that learn beside an engine that answers, over one copy of the base's weights.

learner.py is the thread that trains, share.py says when it may. Stands on engine/ and twin.py. Begin in learner.py.
"""
