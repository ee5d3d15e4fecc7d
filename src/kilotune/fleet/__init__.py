"""Very many adapters over one base model: where they are kept, and how they run and train together."""

from __future__ import annotations

from .bank import AdapterBank
from .store import AdapterStore, Fingerprint, Record, Version, open_store
from .wrapping import wrap

__all__ = ["AdapterBank", "AdapterStore", "Fingerprint", "Record", "Version", "open_store", "wrap"]
