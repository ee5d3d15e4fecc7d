"""What a model in training can be told, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

from torch import Tensor

from .adam import Adam
from .objectives import Objective, Supervised
from .token_rows import TokenRow

__all__ = ["Forward", "ForwardBackward", "Keep", "Operation", "OptimStep", "Save", "Scored", "State", "Stepped"]


@final
@dataclass(frozen=True)
class Forward:
    """The loss of some rows, and the log-probabilities of their labels.

    without: the model without its own adapter: the base, or what is beneath.
    """

    rows: Sequence[TokenRow]
    objective: Objective = field(default_factory=Supervised)
    without: bool = False


@final
@dataclass(frozen=True)
class ForwardBackward:
    """The same, and its gradient is added to what the adapter has learned since its last step.

    divisor: what the sum of the rows' losses is divided by; None: by the objective's own count of them (a mean).
    """

    rows: Sequence[TokenRow]
    objective: Objective = field(default_factory=Supervised)
    divisor: float | None = None


@final
@dataclass(frozen=True)
class OptimStep:
    """A step of the optimizer with all that was learned since the last one."""

    how: Adam


@final
@dataclass(frozen=True)
class Save:
    """The adapter as it is now, as :class:`~kilotune.fleet.store.Contents`."""


@final
@dataclass(frozen=True)
class Keep:
    """All that a model is between two steps of its optimizer, as :class:`State`, to go on from elsewhere.

    What it has learned since its last step is not in it.
    """


Operation = Forward | ForwardBackward | OptimStep | Save | Keep


@final
class State(NamedTuple):
    """step: of the optimizer. pieces: passes in which it has learned. tensors: ``values``, ``m``, ``v`` (length,)."""

    step: int
    pieces: int
    tensors: Mapping[str, Tensor]


@final
class Scored(NamedTuple):
    """loss: summed. weight: what it is a mean over. logprobs: of each row's labels (tokens,), 0: it has none."""

    loss: float
    weight: float
    logprobs: list[Tensor]


@final
class Stepped(NamedTuple):
    """step: which one it was, from 1. norm: of the gradient, before it was clipped."""

    step: int
    norm: float
