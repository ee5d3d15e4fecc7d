"""How many tokens a step may have, so that nobody waits long for its end: by the time that the last ones took.

A step cannot be interrupted. Who comes meanwhile waits for its end, and whoever generates gets a token a step; so steps
are to be short. They are not to be small: many tokens at once take less time each. Where one tenant has the engine to
itself a step may take longer, and has more tokens at least.
"""

from __future__ import annotations

from typing import NamedTuple, final

__all__ = ["Pace"]


class Bound(NamedTuple):
    """Of one step. seconds: it is to take at most; least: tokens that it may have whatever they take."""

    seconds: float
    least: int


# On a CPU, tokens of 4,096 features take 1.07 of their time in steps of 512 where a step has 256, and 1.7 with 64.
ALONE, TOGETHER = Bound(0.75, 256), Bound(0.25, 64)


@final
class Pace:
    """Args: most: tokens of any step."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._each: float | None = None  # seconds of a token, of late

    def took(self, tokens: int, seconds: float) -> None:
        """A step was run. One of few tokens tells nothing: what it takes is not for its tokens."""
        if tokens >= min(TOGETHER.least, self._most):
            each = seconds / tokens
            self._each = each if self._each is None else (self._each + each) / 2

    def tokens(self, tenants: int) -> int:
        """How many tokens the next step may have; tenants: of whom something runs or waits."""
        bound = ALONE if tenants < 2 else TOGETHER
        if self._each is None:
            return self._most
        return min(self._most, max(bound.least, int(bound.seconds / max(self._each, 1e-9))))
