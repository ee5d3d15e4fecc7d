"""Tasks. To add one: write one file with a :class:`Task`, and list it here."""

from __future__ import annotations

from ._base import Batch, Limits, Predictions, Prepared, Row, Task
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
