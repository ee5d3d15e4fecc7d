"""How many answers or puts may be in the house at once, in all and for each tenant; the rest is told when to come."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from .http_errors import ApiError

__all__ = ["Gate"]

WINDOW = 128  # answers whose ends tell how fast places become free
LONGEST = 30.0  # seconds that somebody is sent away for


@final
class Gate:
    """Used on the loop's thread only.

    The total is not one that a few busy tenants can take from the others: who has no answer running or waiting is let
    in up to twice of it. what: what it counts, as errors call several of them.
    """

    def __init__(self, total: int, per_tenant: int, what: str = "answers") -> None:
        self.total, self.per_tenant, self.what = total, per_tenant, what
        self.inside: Counter[str] = Counter()
        self.count = 0
        self._ends: deque[float] = deque(maxlen=WINDOW)

    @contextmanager
    def enter(self, tenant: str, answers: int) -> Iterator[None]:
        """Places for ``answers`` of a tenant until the context is left.

        Raises:
            ApiError: there are none now (429), or never so many (400).

        """
        mine = self.inside[tenant]
        if answers > self.per_tenant:
            raise ApiError(
                400, f"{answers} {self.what} at once; this service gives {self.per_tenant} places to each tenant"
            )
        if mine + answers > self.per_tenant:
            self._refuse(f"you have {mine} {self.what} running or waiting, and may have {self.per_tenant}", answers)
        if self.count + answers > self.total * (1 if mine else 2):
            self._refuse(f"the service is busy with {self.count} {self.what}", answers)
        self.inside[tenant] += answers
        self.count += answers
        try:
            yield
        finally:
            self.count -= answers
            self.inside[tenant] -= answers
            if not self.inside[tenant]:
                del self.inside[tenant]
            self._ends.extend([time.monotonic()] * min(answers, WINDOW))

    def _refuse(self, why: str, answers: int) -> None:
        raise ApiError(429, f"{why}; try again", retry_after=self._wait(answers))

    def _wait(self, answers: int) -> float:
        """Seconds after which so many places are likely to be free."""
        if len(self._ends) < 2:
            return 1.0
        rate = len(self._ends) / max(time.monotonic() - self._ends[0], 1e-3)
        return min(LONGEST, answers / rate)
