"""A progress bar where rich is installed, a line per tenth where it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], description: str, show: bool) -> Iterator[T]:
    """Yield ``items`` and, when ``show``, tell on stderr how far it is."""
    if not show:
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except Exception:  # a broken optional package must not break a merge
        for done, item in enumerate(items, 1):
            yield item
            if done * 10 // len(items) != (done - 1) * 10 // len(items):
                print(f"{description}: {done}/{len(items)}", file=sys.stderr)
        return
    yield from rich_track(items, description=description, console=Console(stderr=True))
