"""Where thousands of adapters are kept: by name and version, in one SQLite file, in PostgreSQL, or in folders.

adapter_store.py says what every store does, urls.py opens one. sql.py is the store in a database, sqlite.py and
postgres.py only connect and lock. The way of an adapter's file into a row is in ARCHITECTURE.md. Of fleet/ nothing else
is used here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .adapter_store import AdapterStore, Item
    from .records import (
        Collected,
        Contents,
        Fault,
        Fingerprint,
        Form,
        Moved,
        Record,
        SharedVersion,
        Standing,
        Stats,
        Version,
    )
    from .stands_on import StandsOn
    from .transfer import copy_adapters, export_adapters
    from .urls import open_store

__all__ = [
    "AdapterStore",
    "Collected",
    "Contents",
    "Fault",
    "Fingerprint",
    "Form",
    "Item",
    "Moved",
    "Record",
    "SharedVersion",
    "Standing",
    "StandsOn",
    "Stats",
    "Version",
    "copy_adapters",
    "export_adapters",
    "open_store",
]

if not TYPE_CHECKING:  # type checkers have the imports above, and no name beside them
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "adapter_store": ("AdapterStore", "Item"),
            "records": (
                "Collected",
                "Contents",
                "Fault",
                "Fingerprint",
                "Form",
                "Moved",
                "Record",
                "SharedVersion",
                "Standing",
                "Stats",
                "Version",
            ),
            "stands_on": ("StandsOn",),
            "transfer": ("copy_adapters", "export_adapters"),
            "urls": ("open_store",),
        },
    )
