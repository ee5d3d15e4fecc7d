"""What a search for an intrinsic dimension is run with. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import final

from ...errors import ConfigError, did_you_mean, gather

__all__ = ["STRUCTURES", "Search"]

STRUCTURES = ("did", "said")
PROJECTIONS = ("fastfood", "dense")


@final
@dataclass(frozen=True)
class Search:
    """What is searched, and how finely.

    Attributes:
        structures: "did" (the projected vector is added), "said" (times a learned scale per layer, counted in d).
        lowest, highest: ends of the grid of d.
        points: of the grid, evenly spaced in log d.
        resolution: the bisection stops when the answer is at most 1 + resolution times a d that failed.
        share: of full training's score that is to be reached.
        seeds: runs per d, with ``first_seed``, ``first_seed + 1``, ...
        first_seed: the first seed.
        rates: learning rates that are tried at each d, rising.
        full_rates: the same for full training.
        projection: "fastfood" or "dense".

    Raises:
        ConfigError: for everything that is wrong, at once.
    """

    structures: tuple[str, ...] = STRUCTURES
    lowest: int = 30
    highest: int = 3000
    points: int = 5
    resolution: float = 0.1
    share: float = 0.9
    seeds: int = 3
    first_seed: int = 0
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    full_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    projection: str = "fastfood"

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)}, and must be {least} or more"
            for name, least in (("lowest", 1), ("points", 2), ("seeds", 1), ("first_seed", 0))
            if getattr(self, name) < least
        ]
        if self.highest <= self.lowest:
            faults.append(f"highest is {self.highest}, and must be more than lowest, {self.lowest}")
        if not 0 < self.resolution < math.inf:
            faults.append(f"resolution is {self.resolution}, and must be a positive number")
        if not 0 < self.share <= 1:
            faults.append(f"share is {self.share}, and must be more than 0 and at most 1")
        for name in ("rates", "full_rates"):
            rates = getattr(self, name)
            rising = all(a < b for a, b in pairwise(rates))
            if not rates or not all(0 < rate < math.inf for rate in rates) or not rising:
                faults.append(f"{name} is {list(rates)}, and must be rising positive numbers, at least one")
        if self.projection not in PROJECTIONS:
            faults.append(f"projection is {self.projection!r}.{did_you_mean(self.projection, PROJECTIONS)}")
        if not self.structures or not {*self.structures} <= {*STRUCTURES}:
            faults.append(f"structures is {list(self.structures)}, and must be some of {list(STRUCTURES)}")
        if faults:
            raise ConfigError(gather("the search cannot be run:", faults))

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds that are reported."""
        return tuple(range(self.first_seed, self.first_seed + self.seeds))
