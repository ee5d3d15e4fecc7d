"""Whether the paths that a verb was given are there: told at once, before torch and transformers are imported."""

from __future__ import annotations

from pathlib import Path

from ..adapter_files.names import CONFIG_NAME, adapter_place, refuse_empty
from ..errors import ConfigError
from ..train.settings.places import check_base

__all__ = ["check_adapter", "is_whole_model"]


def is_whole_model(folder: str) -> bool:
    """Whether a folder holds a transformers model and no adapter."""
    path = Path(folder)
    return (path / "config.json").is_file() and not (path / CONFIG_NAME).is_file()


def check_adapter(
    adapter: str,
    base: str | None = None,
    revision: str | None = None,
    *,
    whole: bool = False,
    shapes: bool = False,
    on: str | None = None,
) -> None:
    """Refuse an adapter or a base that is not there, where that is seen without asking the hub.

    Args:
        adapter: a folder, or a hub id.
        base: the same, or what else a base is named by; None: what the adapter names.
        revision: of the base.
        whole: whether a whole model will do.
        on: the adapter that it stands on.
        shapes: whether the base may be a file or a built-in name, for only its shapes are read.

    Raises:
        KilotuneError: with what is wrong.

    """
    if whole and is_whole_model(adapter):
        if base is not None:
            raise ConfigError(f"--base: {adapter!r} is a whole model, and no adapter, so it has no base")
        if on is not None:
            raise ConfigError(f"--on: {adapter!r} is a whole model, and no adapter, so it stands on none")
        return
    for source in (adapter, *([] if on is None else [on])):
        if (place := adapter_place(source)) is not None:
            refuse_empty(place, place)
    if not shapes:
        check_base(base, revision, "--base")
