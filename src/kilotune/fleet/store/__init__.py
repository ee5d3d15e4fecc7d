"""Where thousands of adapters are kept: by name and version, in one SQLite file, in PostgreSQL, or in folders."""

from __future__ import annotations

from .base import AdapterStore, Item
from .fingerprint import Fingerprint
from .records import Collected, Contents, Fault, Form, Moved, Record, Stats, Version
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
    "Stats",
    "Version",
    "copy_adapters",
    "export_adapters",
    "open_store",
]
