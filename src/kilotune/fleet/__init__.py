"""Very many adapters over one base model: where they are kept, and how they run and train together.

store/ keeps them, bank/ has thousands on the model's device for mixed batches, joint/ trains many users' at once.
Stands on train/ and all below it. Begin reading in bank/adapter_bank.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy

if TYPE_CHECKING:
    from .bank.adapter_bank import AdapterBank
    from .joint.joint_training import JointTraining, fit
    from .joint.settings import FleetSettings
    from .joint.sinks import Finished, FolderSink, Sink, StoreSink
    from .joint.users import FleetReport, Progress, User, UserReport
    from .stepper.losses import RowLoss
    from .stepper.wrapping import wrap
    from .store import AdapterStore, Fingerprint, Record, StandsOn, Version, open_store

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
    "StandsOn",
    "StoreSink",
    "User",
    "UserReport",
    "Version",
    "fit",
    "open_store",
    "wrap",
]

if not TYPE_CHECKING:  # type checkers have the imports above, and no name beside them
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "bank.adapter_bank": ("AdapterBank",),
            "joint.joint_training": ("JointTraining", "fit"),
            "stepper.losses": ("RowLoss",),
            "joint.settings": ("FleetSettings",),
            "joint.sinks": ("Finished", "FolderSink", "Sink", "StoreSink"),
            "joint.users": ("FleetReport", "Progress", "User", "UserReport"),
            "stepper.wrapping": ("wrap",),
            "store": ("AdapterStore", "Fingerprint", "Record", "StandsOn", "Version", "open_store"),
        },
    )
