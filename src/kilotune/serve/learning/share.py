"""When a pass of training may run, beside an engine that answers: as much as its share of a core, and no less.

While nothing is answered, one pass follows the other. While something is, a pass that took 1 s of the processor at a
share of 0.25 cores is followed by 4 s without one. A pass is not interrupted, so it is the longest that anybody waits
for training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import final

from ...errors import ConfigError

__all__ = ["Share"]

LEAST = 1e-6  # seconds that nobody waits for


@final
class Share:
    """A part of the processor.

    Args:
        cores: how many seconds of it training has a second, while the engine has something to answer.
        saved: seconds of it that may be saved up, for passes that come in a row then.
        clock: seconds.

    """

    def __init__(self, cores: float, saved: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        if not 0 < cores < float("inf"):
            raise ConfigError(f"share: expected a number of cores above 0, such as 0.25, got {cores!r}")
        self.cores, self._saved, self._clock = cores, saved, clock
        self._credit, self._at = saved, clock()

    def wait(self, busy: bool) -> float:
        """Seconds until the next pass may begin, if it goes on like this; 0: now. busy: something is answered."""
        now = self._clock()
        self._credit = min(self._saved, self._credit + (now - self._at) * self.cores)
        self._at = now
        return -self._credit / self.cores if busy and self._credit < -LEAST else 0.0

    def took(self, seconds: float, busy: bool) -> None:
        """A pass took so many seconds of the processor. busy: something was answered when it began."""
        if busy:
            self._credit -= seconds
