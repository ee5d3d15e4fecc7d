"""On which shared adapter a personal one stands: said in the header of its weights' file.

A personal adapter that was trained over a shared one does what it does on top of that one alone. Its file says so::

    "kilotune_stands_on": {"name": "house-style", "version": 3, "sha256": "51c3..."}

In a store the same header has the store's own hash of the shared version, too, which no file has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from ..errors import CheckpointError

__all__ = ["HEADER", "StandsOn", "StandsOnWarning", "stored_of", "with_mark"]

HEADER = "kilotune_stands_on"  # in the header of adapter_model.safetensors
STORED = "stored"


class StandsOnWarning(UserWarning):
    """A personal adapter runs without the shared one that it stands on."""


@final
@dataclass(frozen=True)
class StandsOn:
    """The adapter beneath another.

    name: what it was called where the other was trained. version: its number, if it came out of a store. sha256: of
    what it computes (``adapter_files/content.py``), which is the same wherever it is kept.
    """

    name: str
    version: int | None
    sha256: str

    def __str__(self) -> str:
        version = "" if self.version is None else f", version {self.version}"
        return f"{self.name!r} ({self.sha256[:12]}{version})"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def header(self) -> dict[str, str]:
        """For the header of the weights' file."""
        return {HEADER: json.dumps(self.to_dict(), sort_keys=True)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> StandsOn:
        """The inverse of :meth:`to_dict`.

        Raises:
            CheckpointError: it is nothing of the kind.

        """
        found = cls(*(told.get(key) for key in ("name", "version", "sha256")))  # type: ignore[arg-type]
        numbered = found.version is None or (isinstance(found.version, int) and not isinstance(found.version, bool))
        if not _is_word(found.name) or not _is_word(found.sha256) or not numbered:
            raise CheckpointError(f"stands_on: expected name, version and sha256, got {dict(told)!r:.200}")
        return found

    @classmethod
    def of_header(cls, header: Mapping[str, str]) -> StandsOn | None:
        """What a weights' file says; None where it stands on the base.

        Raises:
            CheckpointError: it says something, and not that.

        """
        if HEADER not in header:
            return None
        try:
            told = json.loads(header[HEADER])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{HEADER} in the header of the weights is no JSON: {error}") from error
        if not isinstance(told, Mapping):
            raise CheckpointError(f"{HEADER} in the header of the weights: expected an object, got {told!r:.200}")
        return cls.from_dict(told)


def with_mark(header: Mapping[str, str], on: StandsOn | None, stored: str | None = None) -> dict[str, str]:
    """``header`` with what it says of that in place of what it said; None: nothing.

    ``stored``: the hash of the shared version in a store, for what the store itself keeps.
    """
    plain = {key: value for key, value in header.items() if key != HEADER}
    if on is None:
        return plain
    more = {} if stored is None else {STORED: stored}
    return {**plain, HEADER: json.dumps({**on.to_dict(), **more}, sort_keys=True)}


def stored_of(header: Mapping[str, str]) -> str | None:
    """The hash that the store has of the shared version; None where the header says nothing of one.

    Raises:
        CheckpointError: it is no header of a store's.

    """
    if StandsOn.of_header(header) is None:
        return None
    stored = json.loads(header[HEADER]).get(STORED)
    if not isinstance(stored, str):
        raise CheckpointError(f"{HEADER} in the header: expected the hash that the store has, got {stored!r}")
    return stored


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value != ""
