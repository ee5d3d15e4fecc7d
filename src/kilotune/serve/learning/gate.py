"""What a model has to pass before it answers: it is measured before it learns, as what is live is, and after.

==============  ==================================================================================  =================
finite          losses and distributions are finite numbers
guard           KL(live || candidate) on texts that are never learned, nats a token                 ``divergence``
held out        loss on these texts, nats a token, above what is live                               ``held_out``
replayed        loss on corrections that were known, the mean of nats a token, above what is live   ``replayed``
new             loss on the new lessons is lower than that of what is live
==============  ==================================================================================  =================
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import final

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...fleet.stepper.losses import IGNORED
from .guard import Guarded, Row, said_by
from .learner import Learner
from .lessons import Taught
from .study import GREEDY, correction_scores

__all__ = ["Bounds", "Gate", "Verdict"]

REPLAYED = 32  # corrections that were known, of which the gate looks at the newest


@final
@dataclass(frozen=True, kw_only=True)
class Bounds:
    """By how much a candidate may be further from, or worse than, what is live; nats a token (see the module)."""

    divergence: float = 0.5
    held_out: float = 0.75
    replayed: float = 0.3


@final
@dataclass(frozen=True)
class Verdict:
    """faults: why a candidate may not go live; none: it may. measured: numbers, by name."""

    faults: tuple[str, ...]
    measured: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether it may go live."""
        return not self.faults


@final
@dataclass(frozen=True)
class _Looked:
    """Losses, nats a token. held_out: of the guard's rows. known, fresh: of corrections; empty where there are none."""

    held_out: float
    known: float
    fresh: float


@final
class Gate:
    """Made of a model in training as it is live, before it learns.

    Args:
        learner: in which ``model`` is open.
        model: what is judged.
        live: whether it is a version that is live; else what is beneath it is.
        fresh: new lessons.
        known: lessons that it knows.
        guard: over what it stands on.
        bounds: see there.

    Attributes:
        known: corrections that it does know, of the newest: greedy answers are these.

    """

    def __init__(
        self,
        learner: Learner,
        model: str,
        live: bool,
        fresh: Sequence[Taught],
        known: Sequence[Taught],
        guard: Guarded,
        bounds: Bounds,
    ) -> None:
        self._learner, self._model, self._bounds, self._rows = learner, model, bounds, guard.gate
        self._fresh = [one.rows[0] for one in fresh if one.kind == "correction"]
        newest = [one for one in known if one.kind == "correction"][-REPLAYED:]
        self._known = [one.rows[0] for one in newest]
        self._live = [said_by(learner, model, row, without=not live) for row in guard.gate]
        scores = correction_scores(learner, model, self._known)
        self.known = [one for one, (_, least) in zip(newest, scores, strict=True) if least >= GREEDY]
        self._before = self._look(self._live, scores)

    def judge(self) -> Verdict:
        """The model as it is now, beside what is live."""
        said = [said_by(self._learner, self._model, row) for row in self._rows]
        if not all(bool(torch.isfinite(one).all()) for one in said):
            return Verdict(("its outputs are not finite",), {})
        try:
            after = self._look(said, correction_scores(self._learner, self._model, self._known))
        except UnsupportedError as error:
            return Verdict((f"its outputs cannot be used: {error}",), {})
        apart = _divergence(self._live, said)
        before, bounds = self._before, self._bounds
        measured = {"kl": apart, **{f"{name}_live": loss for name, loss in asdict(before).items()}, **asdict(after)}
        measured = {name: value for name, value in measured.items() if math.isfinite(value)}
        limits = [
            ("KL from what is live on the guard's texts", apart, bounds.divergence),
            ("the loss on held-out texts rose by", after.held_out - before.held_out, bounds.held_out),
        ]
        if self._known:
            limits.append(("the loss on earlier corrections rose by", after.known - before.known, bounds.replayed))
        faults = [
            f"{what} {value:.3g} nats a token; at most {most:g} is let through"
            for what, value, most in limits
            if not value <= most
        ]
        if self._fresh and not after.fresh < before.fresh:
            faults.append(
                f"the loss on the new corrections did not fall: {before.fresh:.3g} to {after.fresh:.3g} nats a token"
            )
        return Verdict(tuple(faults), measured)

    def _look(self, said: Sequence[Tensor], known: Sequence[tuple[float, float]]) -> _Looked:
        """said: what the model says of the guard's rows. known: the scores of what it knows."""
        losses = [_loss(told, row) for told, row in zip(said, self._rows, strict=True)]
        fresh = correction_scores(self._learner, self._model, self._fresh)
        return _Looked(statistics.fmean(losses), _mean(known), _mean(fresh))


def _mean(scores: Sequence[tuple[float, float]]) -> float:
    return statistics.fmean(loss for loss, _ in scores) if scores else math.nan


def _loss(said: Tensor, row: Row) -> float:
    """Nats a token of a row's own text."""
    labels = torch.tensor([label for label in row["labels"][1:] if label != IGNORED])
    return -float(said.gather(1, labels.unsqueeze(1)).double().mean())


def _divergence(live: Sequence[Tensor], said: Sequence[Tensor]) -> float:
    """KL(live || said), nats a token, over all places of all rows."""
    each = [(p.double().exp() * (p.double() - q.double())).sum(1) for p, q in zip(live, said, strict=True)]
    return float(torch.cat(each).mean())
