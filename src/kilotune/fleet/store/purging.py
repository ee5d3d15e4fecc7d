"""Adapters that go for good: every version, the name too, off the disk."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import UnsupportedError, type_name
from . import writing
from .adapter_store import AdapterStore
from .names import check_name
from .sql import SqlStore

__all__ = ["purge"]


def purge(store: AdapterStore, names: Iterable[str]) -> int:
    """Remove adapters of the store's namespace for good; how many versions that were.

    Unlike :meth:`AdapterStore.rm`, it asks neither for aliases nor for who stands on them, nothing of the name is kept,
    and on SQLite nothing of the numbers is in the file any more, nor in its log.

    Args:
        store: in a database.
        names: of adapters; those that are not there are passed over.

    Raises:
        UnsupportedError: the store is folders. StoreLimitError: it is only read. StoreError: it is done, but SQLite's
            log could not be emptied; do it again.

    """
    if not isinstance(store, SqlStore):
        raise UnsupportedError(f"purge: a {type_name(store)} cannot; that needs SQLite or PostgreSQL")
    given = [check_name(name) for name in names]
    store.check_writable()
    return store.erase(lambda link: writing.purge(link, store.namespace, given))
