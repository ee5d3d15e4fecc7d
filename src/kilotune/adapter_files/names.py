"""What an adapter's files are called, and what an adapter can be called. Needs no torch."""

from __future__ import annotations

import re

from ..errors import AdapterError, has_control

__all__ = ["CONFIG_NAME", "REPO_ID", "WEIGHTS_NAME", "check_adapter_name"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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
