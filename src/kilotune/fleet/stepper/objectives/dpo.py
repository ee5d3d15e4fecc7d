"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): of two answers, which is the better one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import RowLoss
from ._base import LabelObjective, row_sums

__all__ = ["Dpo"]


@final
@dataclass(frozen=True)
class Dpo(LabelObjective):
    """The paper's equation 7. Rows come in pairs: the better answer, then the worse one.

    Each row has ``reference``, the log-probability of its whole answer under the reference model.

    Args:
        beta: how strongly the reference holds.
        label_smoothing: the part of the pairs that is taken to be the wrong way round (Mitchell 2023, "cDPO").

    """

    name: ClassVar[str] = "dpo"
    numbers: ClassVar[tuple[str, ...]] = ("reference",)
    rows_each: ClassVar[int] = 2
    beta: float = 0.1
    label_smoothing: float = 0.0

    def of(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> RowLoss:
        gains = row_sums(logprobs) - batch["reference"].to(logprobs.dtype)
        margin = self.beta * (gains[0::2] - gains[1::2])
        each = -(1 - self.label_smoothing) * F.logsigmoid(margin) - self.label_smoothing * F.logsigmoid(-margin)
        return RowLoss(_spread(each), _spread(torch.ones_like(each)))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return len(rows) / 2


def _spread(each: Tensor) -> Tensor:
    """A pair's number stands at its first row."""
    return torch.stack([each, torch.zeros_like(each)], 1).flatten()
