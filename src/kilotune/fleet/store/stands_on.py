"""On which shared adapter a personal one stands: said in its metadata, and in the header of its weights' file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

from ...errors import CheckpointError

__all__ = ["HEADER", "METADATA", "StandsOn"]

METADATA = "stands_on"  # in a version's metadata
HEADER = "kilotune_stands_on"  # in the header of adapter_model.safetensors


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
        if not isinstance(found.name, str) or not isinstance(found.sha256, str) or not numbered:
            raise CheckpointError(f"{METADATA}: expected name, version and sha256, got {dict(told)!r:.200}")
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
