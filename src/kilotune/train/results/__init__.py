"""What a training came to: the best adapter taken, the result written, its report and plots, scores on other data.

Uses all rooms of train/ below it. Begin in outcome.py.
"""
