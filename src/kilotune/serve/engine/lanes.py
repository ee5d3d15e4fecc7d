"""Threads that tenants share: what one of them has to wait for keeps no other one waiting."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar, final

from .cores import compute_alone

__all__ = ["Lane", "Lanes"]

T = TypeVar("T")


@final
class Lanes:
    """Threads for calls that wait for something, or work for long. From any asyncio loop.

    Args:
        name: of the threads.
        threads: how many.
        each: how many of them one tenant has at most, and no more than are left free for others: so who comes anew
            finds one, however many those have who were there before. Who waits gets one before those who have more,
            and else tenants in turn.

    """

    def __init__(self, name: str, threads: int, each: int) -> None:
        self.threads, self.each = threads, each
        self._pool = ThreadPoolExecutor(threads, name, initializer=compute_alone)
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[Future[None]]] = OrderedDict()  # whose turn it is first

    def close(self) -> None:
        """Let go of the threads; what runs in them goes on."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def lane(self, tenant: str) -> AsyncIterator[Lane]:
        """A thread for this tenant until the context is left, and until what runs in it has ended; may have to wait."""
        place: Future[None] = Future()
        with self._lock:
            self._waiting.setdefault(tenant, deque()).append(place)
            self._give()
        lane = Lane(self._pool)
        try:
            if not place.done():
                await asyncio.wrap_future(place)
            yield lane
        finally:
            if place.cancelled():
                self._give_up(tenant, place)
            else:
                lane.after(lambda: self._leave(tenant))

    def _give(self) -> None:
        """Give free threads to those who wait."""
        while (free := self.threads - self._taken.total()) > 0:
            may = [one for one in self._waiting if self._taken[one] < min(self.each, free)]
            if not may:
                return
            tenant = min(may, key=lambda one: self._taken[one])
            queue = self._waiting.pop(tenant)
            place = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind the others
            if place.set_running_or_notify_cancel():  # else who waited has left, in this very moment
                self._taken[tenant] += 1
                place.set_result(None)

    def _give_up(self, tenant: str, place: Future[None]) -> None:
        with self._lock:
            queue = self._waiting.get(tenant, deque())
            with contextlib.suppress(ValueError):
                queue.remove(place)
            if not queue:
                self._waiting.pop(tenant, None)

    def _leave(self, tenant: str) -> None:
        with self._lock:
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]
            self._give()


@final
class Lane:
    """A thread of :class:`Lanes` that one tenant has for now."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._last: Future[Any] | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """Run a call in the thread. Where nobody waits for it any more, it goes on and keeps its thread to its end."""
        made = self._last = self._pool.submit(call)
        return await asyncio.wrap_future(made)

    def after(self, then: Callable[[], None]) -> None:
        """Call ``then`` once the last call has ended: now, where it has."""
        if self._last is None:
            then()
        else:
            self._last.add_done_callback(lambda _: then())
