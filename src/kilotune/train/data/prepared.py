"""Data ready for a Trainer: rows, batches, what the model takes of them, and what a task made of its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, final

from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Batch", "Limits", "Predictions", "Prepared", "Row"]

Row = dict[str, Any]
"""One prepared example: plain lists, numbers or tensors, as the task's ``collate`` takes them."""
Batch = dict[str, Tensor]
"""The keyword arguments of the model's forward, ``labels`` among them."""


class Predictions(Protocol):
    """What transformers' ``EvalPrediction`` has: arrays over all rows of a split, padded with -100."""

    @property
    def predictions(self) -> Any:
        """Of the reduced logits."""

    @property
    def label_ids(self) -> Any:
        """The labels of the batches."""


@final
@dataclass(frozen=True)
class Limits:
    """What the model takes.

    Attributes:
        max_length: positions that it has, in tokens; None: no limit.
        pad_token_id: its padding token; None: the tokenizer's.
        vocabulary: rows of its embedding; None: not known.
        labels: the classes, in order, of a head that is there and is to stay (of an adapter that is gone on from, or
            scored); None: the data says what the classes are.
    """

    max_length: int | None = None
    pad_token_id: int | None = None
    vocabulary: int | None = None
    labels: tuple[str, ...] | None = None


@final
@dataclass(frozen=True)
class Prepared:
    """Data ready for transformers' Trainer (with ``remove_unused_columns=False``: every key of a batch is wanted).

    Attributes:
        train: map-style, of known length; rows ready for ``collate``. Without rows where ``data.train`` is None.
        validation: the same, or None.
        test: the same, or None.
        collate: makes a batch of rows.
        labels: the classes' names in the order of their numbers; None where there are none.
        metrics: the Trainer's ``compute_metrics``: names without ``eval_``; None: the loss alone.
        reduce_logits: the Trainer's ``preprocess_logits_for_metrics``: makes the model's output small before it is
            gathered; None: it is small already.
        best_metric: by which of the metrics, or ``loss``, an evaluation is the better one.
        greater_is_better: whether more of it is better.
        tokens: of one epoch of train, after truncation and without padding; 0 for images.
        notes: what the user has to know: rows cut, left out, warnings. Always shown.
        preview: one example as the model sees it; what the loss leaves out is marked.
        form: what the rows of a model that writes were made into: messages (in the chat template), prompt, text or
            source; None where nothing is written.
    """

    train: Dataset[Row]
    validation: Dataset[Row] | None
    test: Dataset[Row] | None
    collate: Callable[[list[Row]], Batch]
    labels: tuple[str, ...] | None
    metrics: Callable[[Predictions], dict[str, float]] | None
    reduce_logits: Callable[[Any, Tensor], Tensor] | None
    best_metric: str
    greater_is_better: bool
    tokens: int
    notes: tuple[str, ...]
    preview: str
    form: str | None = None
