"""The cache: folders that are there whole or not at all, each made by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ResourceError
from ..whole_file import flush, hold, let_go

__all__ = ["CACHE_VARIABLE", "cache_folder", "check_room", "is_whole", "made", "manifest_of", "sha256_of", "verified"]

CACHE_VARIABLE = "KILOTUNE_CACHE"
MANIFEST = "kilotune-model.json"
WAIT_SECONDS = 0.2


def cache_folder() -> Path:
    """``$KILOTUNE_CACHE``; else ``$XDG_CACHE_HOME/kilotune``, or ``~/.cache/kilotune``."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kilotune"


def made(folder: Path, make: Callable[[Path], Mapping[str, Any]], *, verify: bool = False) -> bool:
    """Let ``folder`` be there, whole; False where it was.

    Several processes may ask at once: one makes it, the others wait. Whatever happens, nothing half made is left under
    its name; what a kill left beside it goes at the next time.

    Args:
        folder: in the cache.
        make: writes the files into the folder that it is given, and returns what is to be known of them.
        verify: compare the checksum of every file of a folder that is there, too, and make it anew where one differs.

    Raises:
        CheckpointError: something else is under that name.
        ResourceError: the cache cannot be written, or is full.

    """
    good = verified if verify else is_whole
    if good(folder):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock")):
            if good(folder):  # another process has made it meanwhile
                return False
            if folder.exists() and manifest_of(folder) is None:
                raise CheckpointError(
                    f"{folder} is there, and kilotune did not make it; move it, or set {CACHE_VARIABLE}"
                )
            _make(folder, make)
    except OSError as error:
        raise ResourceError(
            f"{folder} cannot be written: {error.strerror or error}; set {CACHE_VARIABLE} to a folder with room"
        ) from error
    return True


def _make(folder: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
    beside = f".{folder.name}.making."
    if os.name != "nt":  # there the lock excludes nobody, so what is there may be another's
        for left in folder.parent.glob(f"{beside}*"):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=beside, dir=folder.parent, ignore_cleanup_errors=True) as name:
        new, old = Path(name) / "new", Path(name) / "old"
        new.mkdir()
        known = dict(make(new))
        files = sorted(path for path in new.iterdir() if path.is_file())
        known["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files}
        manifest = new / MANIFEST
        manifest.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in (*files, manifest, new):
            flush(path)
        if folder.exists():  # ours, and damaged
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if not is_whole(folder):  # it is, where there are no locks and another process was faster
                raise
        flush(folder.parent)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    while (held := hold(path)) is None:
        time.sleep(WAIT_SECONDS)
    try:
        yield
    finally:
        let_go(held, path)


def check_room(place: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        ResourceError: less than ``needed`` bytes are free where ``place`` is.

    """
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"{place.parent.parent} has {free / 1e6:,.0f} MB free, and {needed / 1e6:,.0f} MB are needed; set "
            f"{CACHE_VARIABLE} to a folder with room"
        )


# -- what is there -------------------------------------------------------------------------------------


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """What was written down when ``folder`` was made; None where it was not made here, or that is damaged."""
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, dict) and isinstance(known.get("files"), dict) else None


def is_whole(folder: Path) -> bool:
    """Whether every file is there in its size; reads none of them."""
    return _fits(folder, lambda path, said: path.stat().st_size == said["bytes"])


def verified(folder: Path) -> bool:
    """Whether every file is there with its checksum."""
    return _fits(folder, lambda path, said: sha256_of(path) == said["sha256"])


def _fits(folder: Path, fits: Callable[[Path, Any], bool]) -> bool:
    known = manifest_of(folder)
    try:
        return known is not None and all(fits(folder / name, said) for name, said in known["files"].items())
    except (OSError, KeyError, TypeError):
        return False


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
