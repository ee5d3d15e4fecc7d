"""What the demo measured, as plain data, and the checks that decide whether it succeeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any, final

from .measuring import BASE, Answers, Losses
from .settings import PeopleSettings
from .training import SHARED, Trained

__all__ = ["Check", "PeopleResult", "Person", "Question", "Row"]

SAME = 1e-3
"""Nats by which a row in a mixed batch may differ from the row alone: roundings in another order."""


@final
@dataclass(frozen=True)
class Check:
    """A claim, whether it holds, and what was measured."""

    name: str
    passed: bool
    detail: str


@final
@dataclass(frozen=True)
class Person:
    """One of the people. people: who wrote the text. bytes: of the adapter in the store; 0: nothing was kept."""

    name: str
    title: str
    people: tuple[str, ...]
    bytes: int


@final
@dataclass(frozen=True)
class Question:
    """A held-out prompt. said: what each one wrote; only whose text it is where it is not asked of all."""

    asked: str
    said: Mapping[str, str]


@final
@dataclass(frozen=True)
class Row:
    """A row of the table. loss, least, most: held out, of the people. bytes, seconds: of one person more."""

    name: str
    loss: float
    least: float
    most: float
    bytes: int
    seconds: float


@final
@dataclass(frozen=True)
class PeopleResult:
    """All that the report shows.

    text: what is said of the data (source, licence, kind, rule, task). base: likewise of the model. numbers: that are
    trained, of the shared adapter and of a personal one. losses: by adapter, by whose text. alone: the largest distance
    in nats a token between a person's text in the mixed batch and alone. seconds: by part of this run. faults: of the
    store. trained_now: False where the adapters were there.
    """

    settings: PeopleSettings
    text: Mapping[str, str]
    base: Mapping[str, Any]
    numbers: Mapping[str, int]
    shared_bytes: int
    people: tuple[Person, ...]
    shared: Trained
    personal: Trained
    losses: Losses
    alone: float
    questions: tuple[Question, ...]
    answers: Answers
    seconds: Mapping[str, float]
    faults: tuple[str, ...]
    trained_now: bool
    versions: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Of the people."""
        return [person.name for person in self.people]

    @property
    def personal_bytes(self) -> int:
        """Of one adapter in the store; 0 where nothing was kept for anybody."""
        return max(person.bytes for person in self.people)

    def own(self, name: str) -> float:
        """The loss of one's text under one's own adapter."""
        return self.losses[name][name]

    def gains(self) -> list[float]:
        """By how much one's own is below the shared one, for each."""
        return [self.losses[SHARED][name] - self.own(name) for name in self.names]

    def others(self, name: str) -> list[float]:
        """The losses of one's text under everybody else's adapter."""
        return [self.losses[other][name] for other in self.names if other != name]

    def best(self, name: str) -> bool:
        """Whether one's own adapter has the least loss of all that there are."""
        return self.own(name) < min([self.losses[BASE][name], self.losses[SHARED][name], *self.others(name)])

    @property
    def rows(self) -> list[Row]:
        """The table."""
        losses = {
            "the base alone": [self.losses[BASE][name] for name in self.names],
            "one shared adapter": [self.losses[SHARED][name] for name in self.names],
            "a personal one on top": [self.own(name) for name in self.names],
            "somebody else's on top": [fmean(self.others(name)) for name in self.names],
        }
        each = self.personal.seconds / len(self.people)
        costs = [(0, 0.0), (0, 0.0), (self.personal_bytes, each), (0, 0.0)]
        return [Row(name, fmean(own), min(own), max(own), *cost) for (name, own), cost in zip(losses.items(), costs)]

    @property
    def checks(self) -> list[Check]:
        """What must hold."""
        return [*self._learned(), *self._kept()]

    @property
    def failures(self) -> list[Check]:
        """What does not."""
        return [check for check in self.checks if not check.passed]

    def _learned(self) -> list[Check]:
        best, needed = [name for name in self.names if self.best(name)], len(self.people) - 1
        gains = self.gains()
        mean, error = fmean(gains), stdev(gains) / sqrt(len(gains))
        lower = [name for name in self.names if self.losses[SHARED][name] < self.losses[BASE][name]]
        return [
            Check(
                f"one's own adapter has the least held-out loss of all, for at least {needed} of {len(self.people)}",
                len(best) >= needed,
                f"for {len(best)}: {', '.join(best) or 'nobody'}",
            ),
            Check(
                "the mean gain of the personal adapters over the shared one is more than twice its standard error",
                mean > 2 * error,
                f"{mean:.3f} nats a token, standard error {error:.3f}",
            ),
            Check(
                "the shared adapter is better than the base for everybody",
                len(lower) == len(self.people),
                f"for {len(lower)} of {len(self.people)}",
            ),
        ]

    def _kept(self) -> list[Check]:
        return [
            Check(
                "a row in a batch of many people has the loss that it has alone",
                self.alone < SAME,
                f"the largest difference is {self.alone:.1e} nats a token",
            ),
            Check(
                "the store holds what was put into it",
                not self.faults,
                "; ".join(self.faults) or f"{1 + sum(person.bytes > 0 for person in self.people)} adapters verified",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "passed": not self.failures,
            "checks": [asdict(check) for check in self.checks],
            "settings": self.settings.to_dict(),
            "text": dict(self.text),
            "base": dict(self.base),
            "numbers": dict(self.numbers),
            "table": [asdict(row) for row in self.rows],
            "people": [asdict(person) for person in self.people],
            "shared_bytes": self.shared_bytes,
            "losses": self.losses,
            "gains": dict(zip(self.names, self.gains())),
            "shared": self.shared.to_dict(),
            "personal": self.personal.to_dict(),
            "questions": [{"asked": one.asked, "said": dict(one.said)} for one in self.questions],
            "answers": asdict(self.answers),
            "alone": self.alone,
            "trained_now": self.trained_now,
            "seconds": dict(self.seconds),
            "versions": dict(self.versions),
        }
