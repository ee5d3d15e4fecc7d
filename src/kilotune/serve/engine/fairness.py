"""Who is next: tenants in turn by the tokens that they were served, so that none waits for another's flood.

Each tenant has a count of tokens that were computed for it (prompts and answers). Who has the least is next. A tenant
that comes back begins at the least count of those who are there, so that nobody saves up turns while away. That is the
virtual token counter of Sheng et al. 2024, arXiv 2401.00588.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar, final

__all__ = ["FairQueue"]

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
