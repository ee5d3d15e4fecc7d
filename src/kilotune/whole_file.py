"""Files that are there whole or not at all: written beside their place first, then renamed into it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["flush", "replacing"]


@contextmanager
def replacing(path: Path, *, shared: bool = False, flushed: bool = False) -> Iterator[Path]:
    """Where to write what ``path`` will be; it takes the place of ``path`` once the context ends without an error.

    Args:
        path: what is there stays as it is until then.
        shared: others may write it at the same time, so the name beside it is nobody else's. Without it the name is
            always the same, and what a kill left there is written over by the next.
        flushed: it is on disk, and under its name, when this ends.

    """
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8) if shared else 'new'}")
    try:
        yield fresh
        if flushed:
            flush(fresh)
        os.replace(fresh, path)
    except BaseException:
        with suppress(OSError):  # what went wrong before says more
            fresh.unlink(missing_ok=True)
        raise
    if flushed:
        flush(path.parent)


def flush(path: Path) -> None:
    """Let a file's content, or the names in a folder, be on disk."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # there a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
