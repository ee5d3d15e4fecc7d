"""What inspect, merge and convert share: an adapter's folder, and the base that it belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..checkpoint import REPO_ID, AdapterFile, locate, match_tensors, read
from ..errors import CheckpointError, ConfigError, TargetError
from ..inject import plan as plan_adapter
from ..plan import Base, BuiltIn, Head, load_base
from ..targets import HEADS
from .plan import models

__all__ = ["base_of", "check_out", "fitting_base", "head_labels", "open_adapter"]

WINDOWS_DRIVE = re.compile(r"[A-Za-z]:")


def open_adapter(adapter: str, revision: str | None) -> AdapterFile:
    """The adapter's files, from a folder or a hub id, checked."""
    if revision is not None and Path(adapter).exists():
        raise ConfigError(f"--adapter-revision {revision!r}: {adapter!r} is a folder here, so it has no revisions")
    return read(locate(adapter, revision=revision))


def base_of(file: AdapterFile, given: str | None, revision: str | None) -> tuple[str, str | None]:
    """(base, revision): what the user gave, else the hub id that the adapter names.

    A local path that an adapter names is never opened by itself: the adapter may be somebody else's.
    """
    if given is not None:
        return given, revision
    named = file.config.base_model_name_or_path
    if not named:
        raise ConfigError(f"the adapter in {file.folder} does not say what its base is; give it with --base")
    if not REPO_ID.fullmatch(named) or WINDOWS_DRIVE.match(named) or Path(named).exists():
        raise ConfigError(
            f"the adapter in {file.folder} names a local path as its base ({named!r}); if you trust it, give it "
            f"yourself: --base {named}"
        )
    return named, revision or file.config.revision


def fitting_base(
    file: AdapterFile, source: str, revision: str | None, built_in: Mapping[str, BuiltIn] | None = None
) -> Base:
    """The base on the meta device, with the head that the adapter was trained with.

    ``built_in``: the names that stand for no folder and no hub id; by default all that ``kilotune plan`` knows.
    The task that the adapter names, the base's own architecture and the headless model are tried in turn.

    Raises:
        CheckpointError: the adapter fits none of them; everything that does not fit is listed.

    """
    first: Exception | None = None
    labels = head_labels(file)
    known = models() if built_in is None else built_in
    for task in dict.fromkeys((file.config.task_type, None, "FEATURE_EXTRACTION")):
        try:
            base = load_base(source, revision=revision, head=Head(task, labels), built_in=known)
            made = plan_adapter(base.model, "adapter", file.config, file.method, strict=False)
            match_tensors(file, made, type(base.model).__name__)
        except (CheckpointError, TargetError) as error:
            first = first or error
        except ConfigError:
            if task is None:  # a task that this architecture does not have is no fault
                raise
        else:
            return base
    assert first is not None
    raise CheckpointError(f"base {source!r}: {first}") from first


def head_labels(file: AdapterFile) -> int | None:
    """How many labels the classifier in the adapter has; None where it brings none."""
    heads = HEADS.get(file.config.task_type or "", ())
    for key, value in file.tensors.items():
        parts = key.split(".")
        whole = len(parts) == 2 or parts[1:] == ["out_proj", "weight"]
        if parts[0] in heads and whole and parts[-1] == "weight" and value.ndim == 2:
            return int(value.shape[0])
    return None


def check_out(out: Path, sources: Sequence[str | Path], force: bool) -> None:
    """Refuse an output folder that is in use, or that would overwrite what is being read.

    Raises:
        CheckpointError: ``out`` is a file, holds something (and not ``force``), or is or contains a source.

    """
    whole = out.resolve()
    for source in (Path(s).resolve() for s in sources if Path(s).exists()):
        if whole == source or whole in source.parents:
            raise CheckpointError(f"the output {out} is, or contains, {source}, which is read; take another folder")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"the output {out} is a file; expected a folder, or nothing")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise CheckpointError(f"the output {out} is there and not empty; take another folder, or give --force")
