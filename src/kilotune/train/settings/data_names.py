"""What parts and columns of the data are called, and the checks of the settings that name them."""

from __future__ import annotations

from typing import Any

from ...errors import did_you_mean
from .fields import mapping

__all__ = ["ROLES", "SPLITS", "columns", "splits"]

ROLES = (
    "text",
    "text_pair",
    "prompt",
    "completion",
    "messages",
    "label",
    "tokens",
    "tags",
    "image",
    "source",
    "target",
)
SPLITS = ("train", "validation", "test")


def splits(name: str, value: Any) -> list[str]:
    """Names of the parts, with those of a data set of the hub."""
    if found := mapping(name, value):
        return found
    faults = [
        f"{name}: there is no split {key!r} here.{did_you_mean(key, SPLITS)} Splits: {', '.join(SPLITS)}"
        for key in value
        if key not in SPLITS
    ]
    return faults + [
        f"{name}.{key}: expected a split's name, got {split!r}"
        for key, split in value.items()
        if not (isinstance(split, str) and split)
    ]


def columns(name: str, value: Any) -> list[str]:
    """Roles, with names of columns."""
    found = mapping(name, value)
    if found:
        return found
    faults = [
        f"{name}: there is no role {role!r}.{did_you_mean(role, ROLES)} Roles: {', '.join(ROLES)}"
        for role in value
        if role not in ROLES
    ]
    return faults + [
        f"{name}.{role}: expected a column's name, got {column!r}"
        for role, column in value.items()
        if not (isinstance(column, str) and column)
    ]
