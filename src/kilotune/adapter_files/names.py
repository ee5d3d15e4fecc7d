"""What an adapter's files are called, and what an adapter can be called. Needs no torch."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from ..errors import AdapterError, CheckpointError, has_control

__all__ = [
    "CONFIG_NAME",
    "REPO_ID",
    "WEIGHTS_NAME",
    "adapter_place",
    "check_adapter_name",
    "check_shown",
    "composed",
    "refuse_empty",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


# Unicode's Bidi_Control characters, which turn the text around them about, and its line and paragraph separators.
STEERING = re.compile("[\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def adapter_place(source: str | os.PathLike[str]) -> Path | None:
    """The folder of an adapter that is here; None: a hub id.

    Raises:
        CheckpointError: it is a file, or neither of the two.

    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise CheckpointError(f"expected a folder or a hub id (owner/name), got {source!r}")
    path = Path(source)
    if path.is_dir():
        return path
    beside = path.parent != Path() and path.parent.is_dir()  # a mistyped folder need not be asked for on the hub
    if path.exists() or beside or not REPO_ID.fullmatch(str(source)):
        what = "is a file, not a folder" if path.exists() else "is no folder here, and no hub id (owner/name)"
        what = f"is no folder in {path.parent}" if beside and not path.exists() else what
        raise CheckpointError(f"{str(source)!r} {what}")
    return None


def refuse_empty(folder: Path, around: Path) -> None:
    """Refuse a folder without an adapter's configuration; names those in the folders of ``around`` that have one."""
    if not (folder / CONFIG_NAME).is_file():
        near = sorted(str(p.parent.relative_to(around)) for p in around.glob(f"*/{CONFIG_NAME}"))
        hint = f" Adapters are in its subfolders: {', '.join(near[:10])}" if near else ""
        raise CheckpointError(f"{folder} holds no {CONFIG_NAME}.{hint}")


def composed(text: str) -> str:
    """``text`` in Unicode's form NFC, in which one text that people see is one text that is kept."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def check_shown(what: str, text: str) -> str:
    """Refuse new names that would show as others: characters that turn a line about, or break it.

    Raises:
        AdapterError: with the character. Names that a store has already are not held to this.

    """
    if found := STEERING.search(text):
        name = unicodedata.name(found[0])
        raise AdapterError(
            f"{what} {text!r}: holds {name} (U+{ord(found[0]):04X}), with which it shows as another; leave it out"
        )
    return text


def check_adapter_name(name: object) -> str:
    """Return ``name`` if it can name an adapter and its folder, else raise AdapterError."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"adapter name: expected a non-empty string, got {name!r}")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise AdapterError(f"adapter name {name!r}: must not be a path, because it names a folder; leave out / and \\")
    if name in (CONFIG_NAME, WEIGHTS_NAME):
        raise AdapterError(f"adapter name {name!r}: an adapter's files are called so; take another name")
    if name == "__base__":
        raise AdapterError(f"adapter name {name!r}: means a row without an adapter (model.route); take another name")
    size = len(name.encode(errors="replace"))
    if size > 200 or has_control(name):
        raise AdapterError(
            f"adapter name {name!r}: at most 200 bytes in UTF-8 (got {size}), no control characters and no surrogates"
        )
    return name
