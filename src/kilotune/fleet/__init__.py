"""Very many adapters over one base model: where they are kept, and how they run and train together."""

from __future__ import annotations

from .store import AdapterStore, Fingerprint, Record, Version

__all__ = ["AdapterStore", "Fingerprint", "Record", "Version"]
