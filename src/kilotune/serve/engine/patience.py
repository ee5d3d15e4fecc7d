"""How long others may be made to wait, altogether, for what one answer or one tenant has done beside the model."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, final

__all__ = ["ANSWER", "Bound", "Patience", "Tenants"]


class Bound(NamedTuple):
    """seconds: that others wait at first; share: of the time that passes, that they wait later."""

    seconds: float
    share: float


ANSWER, TENANT = Bound(0.5, 0.1), Bound(2.0, 0.2)
TENANTS = 10_000  # of whom it is known what they have used


@final
class Patience:
    """What is left of it, which grows back as time goes on. For one thread.

    Args:
        bound: how much there is.
        clock: seconds.

    """

    def __init__(self, bound: Bound, clock: Callable[[], float] = time.monotonic) -> None:
        self._bound, self._clock = bound, clock
        self._left, self._seen = bound.seconds, clock()

    @property
    def left(self) -> float:
        """Seconds."""
        now = self._clock()
        self._left = min(self._bound.seconds, self._left + self._bound.share * (now - self._seen))
        self._seen = now
        return self._left

    def spend(self, seconds: float) -> None:
        """Others have waited; less than nothing: so much is given back."""
        self._left = self.left - seconds


@final
class Tenants:
    """Of each tenant, also between its answers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[str, Patience] = OrderedDict()

    def of(self, tenant: str) -> Patience:
        """Of this one."""
        found = self._known.pop(tenant, None) or Patience(TENANT, self._clock)
        self._known[tenant] = found
        while len(self._known) > TENANTS:
            self._known.popitem(last=False)
        return found
