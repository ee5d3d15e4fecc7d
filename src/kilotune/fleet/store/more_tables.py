"""What a store's database is asked for by those who keep something beside adapters in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeVar

from .schema import Link

__all__ = ["MoreTables"]

T = TypeVar("T")


class MoreTables(ABC):
    """A database with room for more tables than those of adapters."""

    @abstractmethod
    def make_tables(self, made: Iterable[str]) -> None:
        """Run statements of schema.py's form that make tables where they are not there yet."""

    @abstractmethod
    def erase(self, work: Callable[[Link], T]) -> T:
        """Run ``work`` in a transaction; what it deletes is not in the database's files any more when this returns.

        SQLite: written over with zeros, and the log emptied. PostgreSQL keeps dead rows until VACUUM, and its own log
        and backups for as long as the server is set to.

        Raises:
            StoreError: it is done, but SQLite's log could not be emptied, since somebody read on and on.
        """
