"""Cross-entropy on the labelled tokens, each with a weight of its own where rows have ``weights``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..losses import RowLoss
from ._base import IGNORED, LabelObjective, labelled

__all__ = ["Supervised"]


@final
@dataclass(frozen=True)
class Supervised(LabelObjective):
    """The mean over tokens, weighted: a message's weight of 0 leaves it out. Without ``weights`` all count alike."""

    name: ClassVar[str] = "supervised"

    def of(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> RowLoss:
        weights = batch.get("weights")
        if weights is None:
            return RowLoss(-logprobs.sum(1), (batch["labels"][:, 1:] != IGNORED).sum(1))
        weights = torch.where(batch["labels"] != IGNORED, weights, 0.0).to(logprobs.dtype)
        return RowLoss(-(logprobs * weights).sum(1), weights[:, 1:].sum(1))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(_weight(row) for row in rows))


def _weight(row: Mapping[str, Any]) -> float:
    if "weights" not in row:
        return labelled(row)
    pairs = zip(row["labels"][1:], row["weights"][1:], strict=True)
    return float(sum(weight for label, weight in pairs if label != IGNORED))
