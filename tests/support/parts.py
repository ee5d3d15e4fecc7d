"""A part of all tests: ``--part 2/4`` runs a quarter of them, for what takes longer than there is time."""

from __future__ import annotations

import re
import zlib

__all__ = ["in_part", "part_of"]


def part_of(text: str) -> tuple[int, int]:
    """(which, of how many) of ``K/N``.

    Raises:
        ValueError: it is no such thing.

    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    which, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= which <= count:
        raise ValueError(f"--part: expected K/N with K from 1 to N, such as 2/4, got {text!r}")
    return which, count


def in_part(name: str, which: int, count: int) -> bool:
    """Whether a test is in a part: by its name alone, so that it is in the same one everywhere."""
    return zlib.crc32(name.encode()) % count == which - 1
