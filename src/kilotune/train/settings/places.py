"""Whether what settings name is there: a base model, files of data. Looked at before anything large is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...adapter_files.names import CONFIG_NAME, REPO_ID
from ...bases import GGUF_SUFFIX, PACKAGED, located
from ...errors import ConfigError, did_you_mean, gather

__all__ = ["BASE", "HUB", "base_place", "check_base", "check_data", "missing_file"]

BASE, HUB = "model.base", "hub:"
MODEL_FILE = "config.json"


def base_place(base: str, revision: str | None, name: str = BASE) -> str:
    """The base's folder, or its hub id.

    Args:
        base: what the user wrote.
        revision: of a hub id.
        name: what the user calls the base.

    Raises:
        ConfigError: there is no such folder, it holds no model, or has no revisions; the model cannot be fetched.

    """
    source = located(base)
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            option = "model.revision" if name == BASE else "--revision"
            what = "a folder here" if source == base else "no hub id"
            raise ConfigError(f"{option}: {base!r} is {what}, so it has no revisions")
        if (folder / CONFIG_NAME).is_file() and not (folder / MODEL_FILE).is_file():
            more = "; to go on from it give its base as model.base, and the adapter as adapter.start"
            raise ConfigError(f"{name}: {base!r} holds an adapter, not a model{more if name == BASE else ''}")
        if not (folder / MODEL_FILE).is_file():
            raise ConfigError(f"{name}: {base!r} holds no {MODEL_FILE}, so it is no model's folder")
    elif folder.exists():
        raise ConfigError(f"{name}: {base!r} is a file; expected a folder with {MODEL_FILE}, a GGUF file, or a hub id")
    elif not REPO_ID.fullmatch(base):
        raise ConfigError(f"{name}: {base!r} is no folder here, and no hub id (owner/name)")
    return source


def check_base(base: str | None, revision: str | None, name: str = BASE) -> None:
    """Refuse a base that :func:`base_place` would refuse, where that is seen without reading or fetching anything."""
    if base is not None and base not in PACKAGED and not base.endswith(GGUF_SUFFIX):
        base_place(base, revision, name)


def missing_file(source: str) -> str | None:
    """What to say where ``source``, which is no data set of the hub, is not there; None: it is."""
    path = Path(source).expanduser()
    if path.exists():
        return None
    hub = f" For a data set of the hub, write {HUB}{source}." if source.count("/") <= 1 and not path.suffix else ""
    if not path.parent.is_dir():
        return f"{source}: there is no such file, and no folder {path.parent}.{hub}"
    near = did_you_mean(path.name, (item.name for item in path.parent.iterdir()))
    return f"{source}: there is no such file or folder.{near}{hub}"


def check_data(sources: str | Sequence[str] | None, name: str, kind: str = "auto") -> None:
    """Refuse files of data that are not there.

    Args:
        sources: paths, or ``hub:NAME``, which is not looked up.
        name: the setting that they stand in, for the message.
        kind: ``data.format``; of ``hub`` nothing is a path.

    Raises:
        ConfigError: all that is missing.

    """
    listed = (sources,) if isinstance(sources, str) else sources or ()
    paths = [source for source in listed if not source.startswith(HUB) and kind != "hub"]
    if faults := [fault for fault in map(missing_file, paths) if fault is not None]:
        raise ConfigError(gather(f"{name} cannot be read:", faults))
