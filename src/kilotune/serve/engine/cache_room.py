"""How much of the cache requests may take, so that short ones have room beside long ones, and long ones their turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

__all__ = ["CacheRoom"]

SHORT = 1 / 32  # of the cache: a request that takes no more is a short one
LONG_ONES = 3 / 4  # of the cache: what the others take together, and one of them at most
FULL = 0.9  # of the cache: what all take when they are let in, so that they can grow


@final
class CacheRoom:
    """A cache of pages. tokens: that it can keep; page: tokens of a page. All sizes are in pages."""

    def __init__(self, tokens: int, page: int) -> None:
        self.page, self.pages = page, tokens // page

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max(1, int(self.pages * LONG_ONES)) * self.page

    def size(self, tokens: int) -> int:
        """What a request takes once its tokens of now are read, and the next one."""
        return -(-(tokens + 1) // self.page)

    def short(self, size: int) -> bool:
        """Whether a request of this size is a short one."""
        return size <= SHORT * self.pages

    def fits(self, size: int, running: Sequence[int], crowded: bool) -> bool:
        """Whether a request may be let in.

        Long requests leave a part to short ones. Where a long one waits, no other long one goes before it, and short
        ones take that part only: so there is room for it once those end that run.

        Args:
            size: of the request.
            running: the sizes of what runs.
            crowded: a long one waits that was to be let in before.

        """
        if not running:
            return True
        short = self.short(size)
        alike = size + sum(other for other in running if self.short(other) == short)
        if size + sum(running) > FULL * self.pages:
            return False
        if short:
            return not crowded or alike <= (FULL - LONG_ONES) * self.pages
        return not crowded and alike <= LONG_ONES * self.pages
