"""The demo's short form needs no download: its people are modules of Python's own standard library.

A row is a line of a module and the line after it. Who writes a module has words of their own, so a small model that has
read other modules gains from knowing whose text it is.
"""

from __future__ import annotations

import sysconfig
from itertools import pairwise
from pathlib import Path

from ...errors import UnsupportedError
from .voices import Voice, Voices

__all__ = ["authors", "others"]

SHORTEST, LONGEST = 12, 60  # characters of a line
PEOPLE = 8
READ = 24  # modules that the base learns from


def authors() -> Voices:
    """The eight largest public modules of the standard library.

    Raises:
        UnsupportedError: this Python has its library without the sources.

    """
    people = []
    for path in _by_size()[:PEOPLE]:
        lines = _lines(path)
        texts: dict[str, str] = {}
        for line, after in pairwise(lines):
            if SHORTEST <= len(line) <= LONGEST and SHORTEST <= len(after) <= LONGEST:
                texts.setdefault(line, after)
        people.append(Voice(path.stem, path.name, (), texts))
    return Voices(
        source="Python's standard library",
        licence="PSF-2.0",
        kind="module of the standard library",
        rule="the eight largest public modules; a line and the next one, both of 12 to 60 characters, each line once",
        task="a line, and the one after it",
        after="\n",
        lead="",
        common=False,
        people=tuple(people),
    )


def others() -> list[str]:
    """The lines of other modules: what the small base learns to write from."""
    return [line for path in _by_size()[PEOPLE : PEOPLE + READ] for line in _lines(path)]


def _by_size() -> list[Path]:
    """The library's public modules that are one file, the largest first."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = sorted(folder.glob("[a-z]*.py"), key=lambda path: (-path.stat().st_size, path.name))
    if len(found) < PEOPLE + READ:
        raise UnsupportedError(
            f"the short form of the demo takes its text from Python's standard library: expected at least "
            f"{PEOPLE + READ} modules in {folder}, got {len(found)}; run it without --quick"
        )
    return found


def _lines(path: Path) -> list[str]:
    return [line for raw in path.read_text(encoding="utf-8").splitlines() if (line := raw.strip())]
