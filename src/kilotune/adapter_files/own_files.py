"""What an adapter may bring beside its two files: a chat template, and files of a tokenizer.

Libraries that train write them into the adapter's folder. They are kept as bytes, and nothing here runs them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError, ConfigError

__all__ = ["OWN_FILES", "TEMPLATE", "check_own", "digest", "json_object", "own_template", "read_own"]

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
OWN_FILES: Mapping[str, int] = {
    TEMPLATE: 2**17,
    CONFIG: 2**22,
    "tokenizer.json": 2**26,
    "added_tokens.json": 2**22,
    "special_tokens_map.json": 2**20,
}
"""Name -> bytes at most."""


def read_own(folder: Path) -> dict[str, bytes]:
    """Those that a folder has.

    Raises:
        CheckpointError: one is too large, or cannot be read.

    """
    found = {}
    for name, most in OWN_FILES.items():
        path = folder / name
        try:
            if path.is_file():
                with path.open("rb") as file:
                    found[name] = file.read(most + 1)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    check_own(found)
    return found


def check_own(files: Mapping[str, bytes]) -> None:
    """Refuse names that are none of these, and what is too large."""
    for name, data in files.items():
        if name not in OWN_FILES:
            raise CheckpointError(f"{name!r} is none of the files that an adapter may bring: {', '.join(OWN_FILES)}")
        if len(data) > OWN_FILES[name]:
            raise CheckpointError(f"{name} has more than {OWN_FILES[name]:,} bytes, which is as many as are kept of it")


def digest(files: Mapping[str, str]) -> str | None:
    """One SHA-256 for files by theirs; None where there are none."""
    if not files:
        return None
    return hashlib.sha256(json.dumps(dict(files), sort_keys=True).encode()).hexdigest()


def own_template(files: Mapping[str, bytes]) -> str | None:
    """The chat template in them: of its own file, else of the tokenizer's configuration, as transformers has it.

    Raises:
        ConfigError: it is no text, or there are several.

    """
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{TEMPLATE} is no text in UTF-8: {error}") from error
    if CONFIG not in files:
        return None
    found = json_object(CONFIG, files[CONFIG]).get("chat_template")
    if found is not None and not isinstance(found, str):
        raise ConfigError(f"{CONFIG}: chat_template: expected one text, and there are several or none")
    if found is not None and len(found) > OWN_FILES[TEMPLATE]:
        raise ConfigError(f"{CONFIG}: chat_template: has more than {OWN_FILES[TEMPLATE]:,} characters")
    return found


def json_object(name: str, data: bytes) -> dict[str, object]:
    """A file as an object; ConfigError where it is none."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: expected an object")
    return found
