"""How far a model is from another one, in the places of a row's labels: the KL divergence.

::

    told = submit("a", Forward([row], Distribution())).result().logprobs[0]          what it would say in each place
    submit("b", Forward([row], Divergence((Likely.of(told),)))).result().loss        nats, summed over the places
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import KeptLogits, RowLoss
from ._base import IGNORED, Objective, labelled

__all__ = ["Distribution", "Divergence", "Likely"]

MOST = 64  # tokens in each place that are told apart


def _distributions(output: Any, labels: Tensor) -> list[Tensor]:
    """Of each row (places, vocabulary): log-probabilities where a label is predicted, whichever it is."""
    wanted = labels[:, 1:] != IGNORED
    if isinstance(output, KeptLogits):
        logits, wanted = output.logits, wanted[:, output.places]
    else:
        found: Tensor = output if isinstance(output, Tensor) else output.logits
        logits = found[:, :-1]
    return [
        F.log_softmax(own[here].float() if own.dtype.itemsize < 4 else own[here], -1)
        for own, here in zip(logits, wanted, strict=True)
    ]


@final
@dataclass(frozen=True)
class Distribution(Objective):
    """Nothing is learned; told of each row are the log-probabilities (places, vocabulary), where it has labels.

    One row at a time: rows have different numbers of places.
    """

    name: ClassVar[str] = "distribution"

    def __call__(self, output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
        (told,) = _distributions(output, batch["labels"])
        zeros = told.new_zeros(1)
        return RowLoss(zeros, zeros + len(told), told.unsqueeze(0))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(map(labelled, rows)))


@final
class Likely(NamedTuple):
    """What a model would say in each place: its most likely tokens, and all others as if they were one.

    So it is kept in kilobytes where the whole vocabulary takes megabytes.

    logprobs: (places, tokens + 1), the last those of all others together; ids: (places, tokens).
    """

    logprobs: Tensor
    ids: Tensor

    @staticmethod
    def of(told: Tensor, most: int = MOST) -> Likely:
        """Of log-probabilities (places, vocabulary), as :class:`Distribution` tells them."""
        ids = told.topk(min(most, told.shape[1] - 1)).indices
        return Likely(_as_one(told, ids), ids)


def _as_one(told: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities (places, tokens + 1) of these tokens, and of all others together."""
    others = told.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([told.gather(1, ids), others], 1)


@final
@dataclass(frozen=True, eq=False)
class Divergence(Objective):
    """KL(target || model) in nats, the mean over the places. Its gradient is 0 where the model is the target.

    Over the tokens that the target tells apart and all others as one, it is at most that over the vocabulary.

    Args:
        targets: of each row, in order.

    """

    name: ClassVar[str] = "divergence"
    rowwise: ClassVar[bool] = False  # a target is a row's own, by its place among all
    targets: tuple[Likely, ...]

    def __call__(self, output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
        found = _distributions(output, batch["labels"])
        each = [
            F.kl_div(_as_one(own, ids.to(own.device)), logprobs.to(own), reduction="sum", log_target=True)
            for own, (logprobs, ids) in zip(found, self.targets, strict=True)
        ]
        totals = torch.stack(each)
        return RowLoss(totals, totals.new_tensor([len(own) for own in found]), totals.detach().unsqueeze(1))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(map(labelled, rows)))
