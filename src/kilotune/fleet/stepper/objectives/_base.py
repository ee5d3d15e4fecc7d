"""What every objective has: the log-probabilities of a row's labels, and what is made of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..losses import IGNORED, RowLoss, label_losses

__all__ = ["IGNORED", "LabelObjective", "Objective", "labelled", "row_sums", "token_logprobs"]


class Objective(ABC):
    """What is learned from rows of tokens: frozen dataclasses, so that equal ones share a pass.

    A row is a mapping: ``input_ids`` and ``labels`` (-100: none), lists of one length, and what ``lists`` and
    ``numbers`` name: further lists of that length, and single numbers.
    """

    name: ClassVar[str]
    lists: ClassVar[tuple[str, ...]] = ()
    numbers: ClassVar[tuple[str, ...]] = ()
    rows_each: ClassVar[int] = 1  # rows, one after the other, that are one example: 2 of a pair
    rowwise: ClassVar[bool] = True  # an example's loss does not depend on the others

    @abstractmethod
    def __call__(self, output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
        """The loss of each row, with what else is told of it. output: has logits. batch: all that rows have."""

    @abstractmethod
    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """What the sum of the losses of these rows is divided by: known before anything is run."""


class LabelObjective(Objective):
    """What is learned from the log-probabilities of the labels alone; they are told of each row."""

    @abstractmethod
    def of(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> RowLoss:
        """The loss of each row. logprobs: (rows, tokens), 0 where there is no label. batch: all that rows have."""

    def __call__(self, output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
        """The loss of each row, and its log-probabilities beside it."""
        logprobs = token_logprobs(output, batch["labels"])
        return self.of(logprobs, batch)._replace(told=logprobs.detach())


def token_logprobs(output: Any, labels: Tensor) -> Tensor:
    """(rows, tokens): of each label given the tokens before it; 0 where there is none, as for the first token.

    output: has logits (rows, tokens, vocabulary), or some of them. labels: (rows, tokens), -100: none.
    """
    return F.pad(-label_losses(output, labels), (1, 0))


def row_sums(logprobs: Tensor) -> Tensor:
    """(rows,): of the whole answer."""
    return logprobs.sum(1)


def labelled(row: Mapping[str, Any]) -> int:
    """Labels of a row that are predicted: the first token's is not."""
    return sum(label != IGNORED for label in row["labels"][1:])
