"""What an adapter was trained on top of: a mark in the header of its weights' file.

A personal adapter that was trained over a shared one does what it does on top of that one alone. Its file says so::

    "kilotune_stands_on": {"name": "house-style", "sha256": "51c3..."}

``name`` is what the shared adapter was called, ``sha256`` its contents (content.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from ..errors import CheckpointError

__all__ = ["KEY", "Mark", "mark_of", "with_mark"]

KEY = "kilotune_stands_on"


@final
@dataclass(frozen=True)
class Mark:
    """The shared adapter below a personal one. name: what it was called. sha256: of its contents, hexadecimal.

    files: of its contents, where ``sha256`` is a store's own hash, which the store's packing changes.
    """

    name: str
    sha256: str
    files: str | None = None

    @property
    def in_folder(self) -> Mark:
        """As it is written into a folder."""
        return self if self.files is None else Mark(self.name, self.files)


def mark_of(header: Mapping[str, str], where: object = "the adapter") -> Mark | None:
    """What the header of a weights' file says that the adapter stands on; None where it stands alone.

    Raises:
        CheckpointError: it says something, and not that.

    """
    if (text := header.get(KEY)) is None:
        return None
    try:
        found = json.loads(text)
        mark = Mark(found["name"], found["sha256"], found.get("files"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        mark = Mark("", "")
    words = (mark.name, mark.sha256, *([] if mark.files is None else [mark.files]))
    if not all(isinstance(word, str) and word for word in words):
        raise CheckpointError(
            f"{where}: {KEY} in its header: expected an object with 'name' and 'sha256', got {text[:200]!r}"
        )
    return mark


def with_mark(header: Mapping[str, str], mark: Mark | None) -> dict[str, str]:
    """``header`` with the mark in it, in place of any that was there; with None without one."""
    plain = {key: value for key, value in header.items() if key != KEY}
    if mark is None:
        return plain
    values = {"name": mark.name, "sha256": mark.sha256, **({} if mark.files is None else {"files": mark.files})}
    return {**plain, KEY: json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)}
