"""Folders of adapters that the operator lets be loaded by name: what is in them is opened, and nothing else.

A path comes from a request. It is followed to where it really is, which must be below an allowed folder, and from there
on opened part by part without following another link, so that what is opened is what was looked at. Only plain files
are read: no sockets, pipes or devices.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ...adapter_files.files import CONFIG_NAME, WEIGHTS_NAME
from ...adapter_files.own_files import OWN_FILES
from .http_errors import ApiError

__all__ = ["opened"]

PARAM = "lora_path"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextlib.contextmanager
def opened(path: str, allowed: Sequence[str], most: int) -> Iterator[tuple[BinaryIO, BinaryIO, dict[str, BinaryIO]]]:
    """The two files of an adapter's folder, open at their beginning, and by name what it brings beside them.

    Args:
        path: absolute.
        allowed: the folders below which, or as which, it may be.
        most: bytes of all files.

    Raises:
        ApiError: 403: it is in none of them, or leads out of them. 404: there is no adapter. 400: it cannot be read, or
            is no plain file. 413: too many bytes.

    """
    with contextlib.ExitStack() as held:
        config, weights = (held.enter_context(_file(path, name, allowed)) for name in (CONFIG_NAME, WEIGHTS_NAME))
        files: dict[str, BinaryIO] = {}
        for name in OWN_FILES:
            if (file := _file_if_there(path, name, allowed)) is not None:
                files[name] = held.enter_context(file)
        size = sum(os.fstat(file.fileno()).st_size for file in (config, weights, *files.values()))
        if size > most:
            raise ApiError(413, f"{PARAM}: the adapter has {size} bytes; at most {most} are taken", param=PARAM)
        yield config, weights, files


def _file_if_there(path: str, name: str, allowed: Sequence[str]) -> BinaryIO | None:
    return _file(path, name, allowed) if os.path.lexists(os.path.join(path, name)) else None


def _file(path: str, name: str, allowed: Sequence[str]) -> BinaryIO:
    root, inside = _place(os.path.join(path, name), allowed)
    try:
        return _open(root, inside)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(path, name) from None
    except OSError as error:  # a link that came since, a socket, no right to read it
        raise ApiError(400, f"{PARAM}: {name} of {path!r} cannot be read: {error.strerror}", param=PARAM) from error


def _place(path: str, allowed: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """(an allowed folder as it really is, the parts below it)."""
    roots = [os.path.realpath(folder) for folder in allowed]
    found = os.path.realpath(path)  # of what is not there as far as it is: whether it is tells nothing outside
    for root in roots:
        with contextlib.suppress(ValueError):
            return root, Path(found).relative_to(root).parts
    raise ApiError(403, f"{PARAM}: is in none of the folders from which adapters may be loaded here", param=PARAM)


def _missing(path: str, name: str) -> ApiError:
    return ApiError(404, f"No adapter found for {path!r}: it has no {name}", param=PARAM)


def _open(root: str, parts: Sequence[str]) -> BinaryIO:
    if not parts:
        raise OSError(0, "it is no plain file")
    with contextlib.ExitStack() as held:
        at = os.open(root, FOLDER)
        held.callback(os.close, at)
        for part in parts[:-1]:
            at = os.open(part, FOLDER, dir_fd=at)
            held.callback(os.close, at)
        found = os.open(parts[-1], FILE, dir_fd=at)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(0, "it is no plain file")
    return os.fdopen(found, "rb")
