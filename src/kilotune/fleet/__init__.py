"""Very many adapters over one base model: where they are kept, and how they run and train together."""

from __future__ import annotations

from .bank import AdapterBank
from .joint import JointTraining, fit
from .joint_settings import FleetSettings
from .losses import RowLoss
from .sinks import Finished, FolderSink, Sink, StoreSink
from .store import AdapterStore, Fingerprint, Record, Version, open_store
from .users import FleetReport, Progress, User, UserReport
from .wrapping import wrap

__all__ = [
    "AdapterBank",
    "AdapterStore",
    "Fingerprint",
    "Finished",
    "FleetReport",
    "FleetSettings",
    "FolderSink",
    "JointTraining",
    "Progress",
    "Record",
    "RowLoss",
    "Sink",
    "StoreSink",
    "User",
    "UserReport",
    "Version",
    "fit",
    "open_store",
    "wrap",
]
