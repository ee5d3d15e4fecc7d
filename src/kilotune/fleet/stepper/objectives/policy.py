"""Policy gradients from sampled answers: importance sampling, PPO's clip and GRPO's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..losses import RowLoss
from ._base import IGNORED, LabelObjective, labelled

__all__ = ["Grpo", "ImportanceSampling", "Ppo"]


def _ratio(logprobs: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(how much likelier each token is now, its advantage, 1 where it counts), (rows, tokens) each."""
    here = (batch["labels"] != IGNORED).to(logprobs.dtype)
    here[:, 0] = 0
    ratio = torch.exp((logprobs - batch["old_logprobs"].to(logprobs.dtype)) * here)
    return ratio, batch["advantages"].to(logprobs.dtype), here


@final
@dataclass(frozen=True)
class ImportanceSampling(LabelObjective):
    """-sum of ratio times advantage, over the tokens. Rows have ``old_logprobs`` and ``advantages``, for each token."""

    name: ClassVar[str] = "importance_sampling"
    lists: ClassVar[tuple[str, ...]] = ("old_logprobs", "advantages")

    def of(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> RowLoss:
        ratio, advantages, here = _ratio(logprobs, batch)
        return RowLoss(-(ratio * advantages * here).sum(1), here.sum(1))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(map(labelled, rows)))


@final
@dataclass(frozen=True)
class Ppo(LabelObjective):
    """PPO's clipped objective (Schulman et al. 2017, arXiv 1707.06347, equation 7), over the tokens.

    Args:
        low, high: the ratio is clipped to [1 - low, 1 + high].

    """

    name: ClassVar[str] = "ppo"
    lists: ClassVar[tuple[str, ...]] = ("old_logprobs", "advantages")
    low: float = 0.2
    high: float = 0.2

    def of(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> RowLoss:
        ratio, advantages, here = _ratio(logprobs, batch)
        clipped = ratio.clamp(1 - self.low, 1 + self.high)
        return RowLoss(-(torch.minimum(ratio * advantages, clipped * advantages) * here).sum(1), here.sum(1))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(map(labelled, rows)))


@final
@dataclass(frozen=True)
class Grpo(LabelObjective):
    """GRPO's objective (Shao et al. 2024, arXiv 2402.03300, equation 3): PPO's clip, each row's mean over its tokens.

    Rows have ``reference_logprobs`` too where ``beta`` is not 0.

    Args:
        low, high: as PPO's.
        beta: of the penalty for leaving the reference: the paper's unbiased estimate (equation 4) of the KL divergence.

    """

    name: ClassVar[str] = "grpo"
    lists: ClassVar[tuple[str, ...]] = ("old_logprobs", "advantages")
    low: float = 0.2
    high: float = 0.2
    beta: float = 0.0

    def of(self, logprobs: Tensor, batch: Mapping[str, Tensor]) -> RowLoss:
        ratio, advantages, here = _ratio(logprobs, batch)
        each = -torch.minimum(ratio * advantages, ratio.clamp(1 - self.low, 1 + self.high) * advantages)
        if self.beta:
            apart = (batch["reference_logprobs"].to(logprobs.dtype) - logprobs) * here
            each = each + self.beta * (torch.exp(apart) - apart - 1)
        return RowLoss((each * here).sum(1) / here.sum(1).clamp(min=1), torch.ones_like(here[:, 0]))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(len(rows))
