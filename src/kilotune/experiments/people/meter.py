"""How far a run of several parts is, as one bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import final

__all__ = ["Meter", "Tick"]

Tick = Callable[[float], None]
"""Told which part of the present work is done, from 0 to 1."""
UNITS = 1000


@final
class Meter:
    """Joins parts to one whole.

    Args:
        report: hears (what is done now, units done, units in all).
        parts: how long each takes, in whatever unit; those that are left out of a run count as done when they end.

    """

    def __init__(self, report: Callable[[str, int, int], None] | None, parts: Mapping[str, float]) -> None:
        self._report, self._parts, self._done = report, dict(parts), 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[Tick]:
        """Inside of this the part ``name`` runs."""
        total, weight = sum(self._parts.values()), self._parts[name]

        def tick(share: float) -> None:
            if self._report is not None:
                done = self._done + weight * min(max(share, 0.0), 1.0)
                self._report(name, round(UNITS * done / total), UNITS)

        tick(0.0)
        yield tick
        tick(1.0)
        self._done += weight
