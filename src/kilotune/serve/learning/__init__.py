"""Adapters that learn beside an engine that answers, over one copy of the base's weights.

learner.py is the thread that trains, share.py says when it may; jobs.py is what jobs are in the store, runner.py runs
them, training.py is what the routes work with; turns.py says when whose feedback is learned, workers.py takes what is
due; personal.py learns from feedback, and gate.py says what may answer. Stands on engine/ and twin.py. Begin in
learner.py.
"""
