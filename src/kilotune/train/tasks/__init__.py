"""Tasks. To add one: write one file with a :class:`Task`, and list it here.

A task says how data becomes batches and a loss, and how predictions are scored. Its file uses `_base.py`, data/,
metrics.py and settings/. Begin in text_classification.py, the shortest.
"""

from __future__ import annotations

from ..data.prepared import Batch, Limits, Predictions, Prepared, Row
from ._base import Task
from .causal_lm import CausalLm
from .image_classification import ImageClassification
from .regression import Regression
from .seq2seq import Seq2Seq
from .text_classification import TextClassification
from .token_classification import TokenClassification

__all__ = ["TASKS", "Batch", "Limits", "Predictions", "Prepared", "Row", "Task"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (CausalLm, TextClassification, Regression, TokenClassification, ImageClassification, Seq2Seq)
}
