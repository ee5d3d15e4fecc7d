"""The learning rate where none is given, by method and by how long the training is.

::

    rate_for("vera", steps=160)     # what `kilotune train` takes for 160 steps without --learning-rate

A training of few steps needs a larger rate than one of many: with Adam every number moves by about the rate in each
step, so what it can come to is steps times rate. The rule is a power of the number of steps, with a rate and a power
that each method says of itself (``Method.usual_rate``). VeRA's, LoRA's, IA3's and Uni-LoRA's were held against a grid
on SmolLM2, the others are places to start from (benchmarks/defaults.py; the table is in docs/training.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

__all__ = ["WITHOUT_ADAPTER", "TakenRate", "method_behind", "rate_for", "usual"]

SHORT, LONG = 20, 10_000  # steps between which the rule holds; outside, it stays what it is at the end


# As a method's usual_rate: for 100 steps, and the power of (100 / steps).
WITHOUT_ADAPTER: Mapping[str, tuple[float, float]] = {"full": (1e-4, 0.45), "head": (1e-2, 0.45)}


@final
@dataclass(frozen=True)
class TakenRate:
    """value: the highest learning rate of the training. why: in one sentence. tried: (rate, loss) of the test."""

    value: float
    why: str
    tried: tuple[tuple[float, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return asdict(self)


def rate_for(method: str, steps: int) -> float:
    """The learning rate to train with, where nobody says another.

    Args:
        method: of an adapter, or a preset (which has its method's), or ``full``, or ``head``.
        steps: of the optimizer, in all.

    """
    at_100, power = usual(method)
    value = at_100 * (100 / min(max(steps, SHORT), LONG)) ** power
    return float(f"{value:.2g}")


def usual(method: str) -> tuple[float, float]:
    """The rate for 100 steps, and the power by which it goes with their number."""
    from ...methods import METHODS

    name = method_behind(method)
    if name in WITHOUT_ADAPTER:
        return WITHOUT_ADAPTER[name]
    rate = METHODS[name].usual_rate
    return rate.at_100, rate.power


def method_behind(method: str) -> str:
    """The method that a preset is of; any other name as it is."""
    from ...methods import PRESETS  # needs torch, which reading settings does without

    return PRESETS.get(method, (method, {}))[0]
