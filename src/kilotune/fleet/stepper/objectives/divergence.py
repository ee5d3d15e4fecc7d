"""How far a model is from another one, in the places of a row's labels: the KL divergence over the whole vocabulary.

::

    told = submit("a", Forward([row], Distribution())).result().logprobs     what it would say in each place
    submit("b", Forward([row], Divergence(tuple(told)))).result().loss       nats, summed over the places
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import KeptLogits, RowLoss
from ._base import IGNORED, Objective, labelled

__all__ = ["Distribution", "Divergence"]


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
@dataclass(frozen=True, eq=False)
class Divergence(Objective):
    """KL(target || model) in nats, the mean over the places. Its gradient is 0 where the model is the target.

    Args:
        targets: of each row, in order, log-probabilities (places, vocabulary), as :class:`Distribution` tells them.

    """

    name: ClassVar[str] = "divergence"
    rowwise: ClassVar[bool] = False  # a target is a row's own, by its place among all
    targets: tuple[Tensor, ...]

    def __call__(self, output: Any, batch: Mapping[str, Tensor]) -> RowLoss:
        found = _distributions(output, batch["labels"])
        each = [
            F.kl_div(own, target.to(own), reduction="sum", log_target=True)
            for own, target in zip(found, self.targets, strict=True)
        ]
        totals = torch.stack(each)
        return RowLoss(totals, totals.new_tensor([len(own) for own in found]), totals.detach().unsqueeze(1))

    def count(self, rows: Sequence[Mapping[str, Any]]) -> float:
        return float(sum(map(labelled, rows)))
