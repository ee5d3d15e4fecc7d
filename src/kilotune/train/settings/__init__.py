"""What a fine-tuning is run with: frozen settings, checked when built, from plain values, YAML or ``a.b=c``.

Uses nothing else of train/. Begin in sections.py; fields.py is what a field's check is made of.
"""
