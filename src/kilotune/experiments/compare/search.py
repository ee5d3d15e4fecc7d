"""A learning rate for one contender: successive halving over a grid that is even in the logarithm.

All rates of the grid are tried with short runs; one in ``reduction`` goes on, with ``reduction`` times the steps, until
runs have their full length (Jamieson and Talwalkar 2016, arXiv 1502.07943). ``spare`` more runs of full length then go
to where they tell most: beyond the grid while the winner is at its edge, else between the winner and its neighbours.
So every contender spends the same number of steps, wherever its best rate lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from ...train.settings.fields import Section, number, setting

__all__ = ["Found", "Search", "Try", "Worth", "halve"]

Worth = tuple[float, float]
"""What a run is judged by, larger first: its score (minus infinity where it diverged), then minus its loss."""


@final
@dataclass(frozen=True, kw_only=True)
class Search(Section):
    """How the learning rates are searched; the same for every contender."""

    SECTION: ClassVar[str] = "search"

    lowest: float = setting(1e-4, number(0, above=True), "The smallest learning rate of the grid.")
    highest: float = setting(1.0, number(0, above=True), "The largest one.")
    points: int = setting(9, number(2, 100, whole=True), "Rates in the grid, evenly in their logarithm.")
    rounds: int = setting(3, number(1, 6, whole=True), "Rounds of halving; the runs of the last one have full length.")
    reduction: int = setting(
        2,
        number(2, 10, whole=True),
        "After each round one rate in so many goes on, with so many times the steps.",
    )
    spare: int = setting(
        2,
        number(0, 20, whole=True),
        "More runs of full length for each contender: beyond the grid while the winner is at its edge, else between "
        "the winner and its neighbours.",
    )
    seed: int = setting(1000, number(0, whole=True), "The seed of the search; none of the reported ones.")

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        low, high = values["lowest"], values["highest"]
        return [] if low < high else [f"{cls.key('highest')}: expected more than lowest ({low:g}), got {high:g}"]

    @property
    def ratio(self) -> float:
        """Between two neighbours of the grid."""
        return float((self.highest / self.lowest) ** (1 / (self.points - 1)))

    @property
    def grid(self) -> tuple[float, ...]:
        """The rates, rising."""
        return tuple(neat(self.lowest * self.ratio**i) for i in range(self.points))

    @property
    def plan(self) -> tuple[tuple[int, float], ...]:
        """(rates, share of full length) of each round."""
        counts, count = [], self.points
        for _ in range(self.rounds):
            counts.append(count)
            count = math.ceil(count / self.reduction)
        return tuple((c, float(self.reduction) ** (i - self.rounds + 1)) for i, c in enumerate(counts))

    @property
    def cost(self) -> float:
        """Of one contender's search, in runs of full length."""
        return sum(count * share for count, share in self.plan) + self.spare

    @property
    def budget(self) -> str:
        """The same as words."""
        parts = [f"{count} rates x {share:.3g}" for count, share in self.plan]
        spare = f" + {self.spare} x 1" if self.spare else ""
        return f"{' + '.join(parts)}{spare} = {self.cost:.4g} runs of full length"


def neat(rate: float) -> float:
    """Three digits, so that the same rate is the same number however it was reached."""
    return float(f"{rate:.3g}")


@final
@dataclass(frozen=True)
class Try:
    """One run of a search: a rate, the share of full length, and what it was worth."""

    rate: float
    share: float
    worth: Worth


@final
@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        rate: the best one at full length; None where every run of full length diverged.
        edge: "lowest" or "highest" where it is that of all rates tried, beyond the grid included: a better one may lie
            further out.
        tries: all runs, in order.
    """

    rate: float | None
    edge: str | None
    tries: tuple[Try, ...]


def halve(search: Search, run: Callable[[float, float], Worth]) -> Found:
    """Search a learning rate.

    Args:
        search: how.
        run: a run at this rate, of this share of the full length; gives what it was worth.
    """
    tries: list[Try] = []

    def attempt(rate: float, share: float) -> None:
        tries.append(Try(rate, share, run(rate, share)))

    left: list[float] = list(search.grid)
    for count, share in search.plan:
        left = sorted(left[:count])
        for rate in left:
            attempt(rate, share)
        worths = {one.rate: one.worth for one in tries if one.share == share}
        left.sort(key=lambda rate: worths[rate], reverse=True)
    for _ in range(search.spare):
        attempt(_next(search, tries), 1.0)
    best = _best(tries)
    if best.worth[0] == -math.inf:
        return Found(None, None, tuple(tries))
    rates = sorted({one.rate for one in tries})
    edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(best.rate)
    return Found(best.rate, edge, tuple(tries))


def _best(tries: list[Try]) -> Try:
    """Of the runs of full length."""
    return max((one for one in tries if one.share == 1), key=lambda one: one.worth)


def _next(search: Search, tries: list[Try]) -> float:
    """Where one more run tells most: see the module's head."""
    rates = sorted({one.rate for one in tries})
    best = _best(tries)
    if best.worth[0] == -math.inf:  # everything diverged: only smaller rates can help
        return neat(rates[0] / search.ratio)
    at = rates.index(best.rate)
    if at == 0:
        return neat(best.rate / search.ratio)
    if at == len(rates) - 1:
        return neat(best.rate * search.ratio)
    below, above = best.rate / rates[at - 1], rates[at + 1] / best.rate
    # The wider gap; of two equal ones the upper. Ratios of rounded rates are equal to three digits at most.
    neighbour = rates[at - 1] if below > above * 1.05 else rates[at + 1]
    return neat(math.sqrt(best.rate * neighbour))
