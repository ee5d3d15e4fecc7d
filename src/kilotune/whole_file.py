"""Files that are there whole or not at all, written beside their place and renamed; files that one process holds."""

from __future__ import annotations

import os
import secrets
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["flush", "hold", "holder", "let_go", "replacing"]


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


# -- one process at a time -----------------------------------------------------------------------------

_held: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()


def hold(path: Path) -> IO[bytes] | None:
    """A file that this process alone holds until it is closed, however the process ends; None where another one does.

    Where the system has no such locks (Windows, some file systems of networks), everybody gets it.

    Raises:
        OSError: the file cannot be made.

    """
    while True:
        file = path.open("a+b")
        if not _lock(file):
            file.close()
            return None
        if _is_at(file, path):  # else who held it before has taken it away meanwhile
            break
        file.close()
    with suppress(OSError):  # on a full disk nobody is told who it is
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
    _held.add(file)
    return file


def holder(path: Path) -> str:
    """Who holds a file, as it says of itself."""
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def let_go(file: IO[bytes], path: Path) -> None:
    """Take a file that this process holds away, and let others have it."""
    with suppress(OSError):
        path.unlink()
    file.close()


def _lock(file: IO[bytes]) -> bool:
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _in_child() -> None:
    for file in list(_held):
        with suppress(OSError):
            file.close()


# A worker that was forked has the lock as well, and would keep it when its parent is killed.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
