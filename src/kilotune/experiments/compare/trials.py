"""One finished run of a comparison, as it is kept on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

__all__ = ["COST", "SEARCH", "START", "TEST", "Trial", "TrialKey"]

START, COST, SEARCH, TEST = "start", "cost", "search", "test"
PARTS = (START, COST, SEARCH, TEST)


@final
@dataclass(frozen=True)
class TrialKey:
    """What was run.

    Attributes:
        part: "start" (nothing is trained), "cost" (bytes and seconds are taken), "search" or "test".
        contender: its method and options, as :attr:`Contender.recipe`; empty for the start.
        rate: learning rate; 0 where nothing is trained.
        budget: share of the full length; 0 where nothing is trained.
        seed: of the run.
    """

    part: str
    contender: str
    rate: float
    budget: float
    seed: int


@final
@dataclass(frozen=True)
class Trial:
    """What it came to.

    Attributes:
        key: what was run.
        values: numbers by name; empty where the training diverged.
        seconds: it took.
    """

    key: TrialKey
    values: Mapping[str, float]
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the training's loss stopped being a number."""
        return not self.values

    def to_dict(self) -> dict[str, Any]:
        """Flat, in plain JSON types."""
        key = self.key
        return {
            "part": key.part,
            "contender": key.contender,
            "rate": key.rate,
            "budget": key.budget,
            "seed": key.seed,
            "values": dict(self.values),
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Trial:
        """The reverse of :meth:`to_dict`.

        Raises:
            ValueError, KeyError: something is missing, too much, or of the wrong type.
        """
        part, contender, seed, values = (plain[name] for name in ("part", "contender", "seed", "values"))
        if len(plain) != 7 or part not in PARTS or type(contender) is not str or type(seed) is not int:
            raise ValueError
        if type(values) is not dict or not all(type(name) is str for name in values):
            raise ValueError
        numbers = [plain["rate"], plain["budget"], plain["seconds"], *values.values()]
        if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            raise ValueError
        key = TrialKey(part, contender, float(plain["rate"]), float(plain["budget"]), seed)
        return cls(key, values, plain["seconds"])
