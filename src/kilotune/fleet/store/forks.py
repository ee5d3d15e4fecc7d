"""Stores that are open when a process forks: told before, and after it in the parent and in the child."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod

__all__ = ["Forking"]

_alive: weakref.WeakSet[Forking] = weakref.WeakSet()


class Forking(ABC):
    """What has to know of a fork, from :meth:`_enlist` on."""

    def _enlist(self) -> None:
        """What the last line of every store's making calls: from now on forks are prepared."""
        _alive.add(self)

    def before_fork(self) -> None:  # noqa: B027 - a database that asks for nothing has none
        """Make ready for a fork, where a database asks for that."""

    def after_fork(self) -> None:  # noqa: B027
        """In the parent: go on."""

    @abstractmethod
    def forked(self) -> None:
        """In a child process: leave the parent its connections, and locks that no thread here will ever open."""


def _in_order() -> list[Forking]:
    return sorted(_alive, key=id)


def _before_fork() -> None:
    for store in _in_order():
        store.before_fork()


def _after_fork() -> None:
    for store in _in_order():
        store.after_fork()


def _forked() -> None:
    for store in _in_order():
        store.forked()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forked)
