"""What `kilotune demo` runs: a model for each of several people over one frozen base.

voices.py says what people and rows are, django_teams.py and library_authors.py bring them; bases.py and toy.py the
model. training.py trains and keeps, measuring.py compares, page.py reports. Begin in experiment.py.
"""
