"""The experiment of `kilotune experiment cnn`: one pretrained network, adapted with VeRA, with LoRA and in full.

Uses images/. Begin in experiment.py; page.py and charts.py make the report of it.
"""
