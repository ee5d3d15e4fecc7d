"""The learning rate where none is given, by method and by how long the training is.

::

    rate_for("vera", steps=160)     # what `kilotune train` takes for 160 steps without --learning-rate

A training of few steps needs a larger rate than one of many: with Adam every number moves by about the rate in each
step, so what it can come to is steps times rate. The rule is a power of the number of steps, with a rate
and a power for each method. VeRA's, LoRA's, IA3's and Uni-LoRA's were held against a grid on SmolLM2, the others are
places to start from (benchmarks/defaults.py; the table is in docs/training.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

__all__ = ["RATES", "Rate", "TakenRate", "method_behind", "rate_for"]

SHORT, LONG = 20, 10_000  # steps between which the rule holds; outside, it stays what it is at the end


@final
@dataclass(frozen=True)
class Rate:
    """at_100: for 100 steps. power: of (100 / steps), by which shorter trainings get more and longer ones less."""

    at_100: float
    power: float = 0.45


RATES: Mapping[str, Rate] = {
    "lora": Rate(7e-3),
    "vera": Rate(8e-2),
    "ia3": Rate(2e-2),
    "bitfit": Rate(1e-2),
    "loraxs": Rate(2e-2),
    "unilora": Rate(0.15),
    "vblora": Rate(2e-2),
    "bottleneck": Rate(3e-3),
    "intrinsic": Rate(5e-2),
    "full": Rate(1e-4),
    "head": Rate(1e-2),
}


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
    rate = RATES[method_behind(method)]
    value = rate.at_100 * (100 / min(max(steps, SHORT), LONG)) ** rate.power
    return float(f"{value:.2g}")


def method_behind(method: str) -> str:
    """The method that a preset is of; any other name as it is."""
    from ...methods import PRESETS  # needs torch, which reading settings does without

    return PRESETS.get(method, (method, {}))[0]
