"""Tasks. To add one: write one file with a :class:`Task`, and list it here."""

from __future__ import annotations

from ._base import Batch, Limits, Predictions, Prepared, Row, Task

__all__ = ["TASKS", "Batch", "Limits", "Predictions", "Prepared", "Row", "Task"]

TASKS: dict[str, type[Task]] = {}
