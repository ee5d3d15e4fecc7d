"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306): an answer, and whether it was good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..losses import RowLoss
from ._base import LabelObjective, row_sums

__all__ = ["Kto"]


@final
@dataclass(frozen=True)
class Kto(LabelObjective):
    """The paper's section 4. Each example is two rows: the answer, then another example's answer to the same prompt.

    The second one is only for the estimate of how far the model has moved in all, in which nothing is learned. Each
    row has ``reference`` (see DPO) and ``good``, 1 or 0; that of a second row does not matter.

    Args:
        beta: how strongly the reference holds.
        desirable, undesirable: weights of good and bad answers.

    """

    name: ClassVar[str] = "kto"
    numbers: ClassVar[tuple[str, ...]] = ("reference", "good")
    rows_each: ClassVar[int] = 2
    rowwise: ClassVar[bool] = False
    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def of(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> RowLoss:
        gains = row_sums(logprobs) - batch["reference"].to(logprobs.dtype)
        own, others = gains[0::2], gains[1::2]
        moved = others.detach().mean().clamp(min=0)
        good = batch["good"][0::2] > 0
        up = self.desirable * (1 - torch.sigmoid(self.beta * (own - moved)))
        down = self.undesirable * (1 - torch.sigmoid(self.beta * (moved - own)))
        each = torch.where(good, up, down)
        zeros = torch.zeros_like(each)
        return RowLoss(torch.stack([each, zeros], 1).flatten(), torch.stack([zeros + 1, zeros], 1).flatten())

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return len(rows) / 2
