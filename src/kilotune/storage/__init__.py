"""Weight storages. To add one: write one file with a :class:`Storage`, and list it here."""

from __future__ import annotations

from torch import nn

from ._base import Kept, Storage
from .dense import Dense

__all__ = ["STORAGES", "Kept", "Storage", "storage_of"]

STORAGES: tuple[Storage, ...] = (Dense(),)


def storage_of(module: nn.Module) -> Storage | None:
    """The storage of ``module``'s weight, or None when there is none for it."""
    return next((storage for storage in STORAGES if storage.matches(module)), None)
