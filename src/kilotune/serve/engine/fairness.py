"""Who is next: tenants in turn by the tokens that they were served, so that none waits for another's flood.

Each tenant has a count of tokens that were computed for it (prompts and answers). Who has the least is next. A tenant
that comes back begins at the least count of those who are there, so that nobody saves up turns while away. That is the
virtual token counter of Sheng et al. 2024, arXiv 2401.00588.

And who of those that run gets how much of a step (:func:`share_out`), so that no short prompt waits for a long one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar, final

__all__ = ["FairQueue", "Unread", "share_out"]

T = TypeVar("T")


@final
class FairQueue(Generic[T]):
    """Items that wait, by tenant. For one thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._served: dict[str, float] = {}
        self._running: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, tenant: str, item: T, first: bool = False) -> None:
        """Let an item wait; ``first``: before the others of its tenant."""
        self._there(tenant)
        queue = self._waiting.setdefault(tenant, deque())
        if first:
            queue.appendleft(item)
        else:
            queue.append(item)

    def _there(self, tenant: str) -> None:
        if tenant not in self._served:
            self._served[tenant] = min(self._served.values(), default=0.0)

    def turn(self) -> list[str]:
        """The tenants that have something waiting, who is next first."""
        return sorted((tenant for tenant, queue in self._waiting.items() if queue), key=lambda t: self._served[t])

    def first(self, tenant: str) -> T:
        """What is next of a tenant."""
        return self._waiting[tenant][0]

    def first_of(self, tenant: str, wanted: Callable[[T], bool]) -> T | None:
        """What is next of those of a tenant's that are ``wanted``."""
        return next((item for item in self._waiting[tenant] if wanted(item)), None)

    def pop(self, tenant: str) -> T:
        """Take what is next of a tenant."""
        item = self._waiting[tenant].popleft()
        self._forget(tenant)
        return item

    def remove(self, tenant: str, item: T) -> bool:
        """Take an item out; whether it was there."""
        queue = self._waiting.get(tenant)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        self._forget(tenant)
        return True

    @property
    def tenants(self) -> int:
        """How many have something that waits or runs."""
        return len(self._served)

    def items(self) -> list[T]:
        """All that waits."""
        return [item for queue in self._waiting.values() for item in queue]

    def started(self, tenant: str) -> None:
        """One of a tenant's items runs now."""
        self._there(tenant)
        self._running[tenant] = self._running.get(tenant, 0) + 1

    def ended(self, tenant: str) -> None:
        """One of a tenant's items runs no more."""
        self._running[tenant] -= 1
        self._forget(tenant)

    def running(self, tenant: str) -> int:
        """How many of a tenant's items run."""
        return self._running.get(tenant, 0)

    def charge(self, tenant: str, amount: float) -> None:
        """Count what was done for a tenant."""
        if tenant in self._served:
            self._served[tenant] += amount

    def _forget(self, tenant: str) -> None:
        """A tenant with nothing here takes no memory."""
        if not self._waiting.get(tenant):
            self._waiting.pop(tenant, None)
            if not self._running.get(tenant):
                self._running.pop(tenant, None)
                self._served.pop(tenant, None)


class Unread(NamedTuple):
    """A prompt of which ``tokens`` are still to be read."""

    id: str
    tenant: str
    tokens: int


def share_out(prompts: Sequence[Unread], tokens: int) -> dict[str, int]:
    """How many tokens of a step each prompt gets, by its id; together all of them, or as many as there are to read.

    Tenants get equal parts; what one has no use for is for the others (max-min fairness). Of a tenant's part its oldest
    prompt gets half at least, so that each has its turn; the rest is for those that have the least left to read, so
    that no short one waits for a long one.

    Args:
        prompts: the oldest first.
        tokens: of the step; each tenant is given some where they are as many as tenants.

    """
    tenants: dict[str, list[Unread]] = {}
    for prompt in prompts:
        tenants.setdefault(prompt.tenant, []).append(prompt)
    given: dict[str, int] = {}
    wanted = sorted((sum(prompt.tokens for prompt in own), tenant) for tenant, own in tenants.items())
    for place, (want, tenant) in enumerate(wanted):
        part = min(want, -(-tokens // (len(wanted) - place)))
        given |= _of_one(tenants[tenant], part)
        tokens -= part
    return given


def _of_one(prompts: Sequence[Unread], tokens: int) -> dict[str, int]:
    """The same for the prompts of one tenant."""
    given = {prompt.id: 0 for prompt in prompts}
    half = -(-tokens // 2)
    for prompt, most in [(prompts[0], half), *((prompt, tokens) for prompt in sorted(prompts, key=lambda p: p.tokens))]:
        more = min(prompt.tokens - given[prompt.id], most, tokens)
        given[prompt.id] += more
        tokens -= more
    return given
