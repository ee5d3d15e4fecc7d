"""What the verbs that take an adapter share: its folder, and the base that it belongs to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..adapter_files import reading
from ..adapter_files.content import content_sha256
from ..adapter_files.files import REPO_ID, fetch_own
from ..adapter_files.fitting import match_tensors
from ..adapter_files.reading import AdapterFile
from ..adapter_files.stands_on import StandsOn, StandsOnWarning
from ..bases import located
from ..candidates import inside
from ..errors import CheckpointError, ConfigError, TargetError, gather
from ..injection.inject import plan as plan_adapter
from ..injection.targets import HEADS
from ..model.peft_model import PeftModel
from ..plan import DTYPES, Base, BuiltIn, Head, load_base
from .plan import models

__all__ = [
    "PERSONAL",
    "SHARED",
    "apart",
    "base_of",
    "check_out",
    "fitting_base",
    "head_labels",
    "load_fitting_base",
    "open_adapter",
    "open_below",
    "put_below",
]

PERSONAL, SHARED = "default", "shared"  # what the adapters of a stack are called in a model

WINDOWS_DRIVE = re.compile(r"[A-Za-z]:")


def open_adapter(adapter: str, revision: str | None) -> AdapterFile:
    """The adapter's files, from a folder or a hub id, checked."""
    if revision is not None and Path(adapter).exists():
        raise ConfigError(f"--adapter-revision {revision!r}: {adapter!r} is a folder here, so it has no revisions")
    file = reading.open_adapter(adapter, revision)
    fetch_own(adapter, revision)
    return file


def open_below(file: AdapterFile, on: str | None) -> AdapterFile | None:
    """The shared adapter that an adapter is to run on top of.

    Args:
        file: the adapter.
        on: what the user says: the shared one's folder or hub id; None: nothing.

    Raises:
        ConfigError: the adapter's file says that it was trained on top of one, and the user nothing; or the shared one
            stands on another itself. CheckpointError: the adapter was trained on top of other contents.

    """
    mark = StandsOn.of_header(file.metadata)
    if on is None:
        if mark is None:
            return None
        beside = file.folder.parent / mark.name
        near = f" (perhaps --on {beside})" if beside.is_dir() else ""
        raise ConfigError(
            f"the adapter in {file.folder} was trained on top of {mark.name!r}, and is another one without it; give "
            f"that one's folder: --on FOLDER{near}"
        )
    below = reading.open_adapter(on)
    if (under := StandsOn.of_header(below.metadata)) is not None:
        raise ConfigError(f"--on {on}: stands on {under.name!r} itself, and a stack has two levels")
    if mark is not None and (actual := content_sha256(below)) != mark.sha256:
        raise CheckpointError(
            f"--on {on}: the adapter in {file.folder} was trained on top of {mark.name!r} with the contents "
            f"{mark.sha256[:12]}..., and this one has {actual[:12]}...: other numbers"
        )
    return below


@contextmanager
def apart() -> Iterator[None]:
    """Inside, an adapter is put into a model whose shared one comes after it, or is not wanted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StandsOnWarning)
        yield


def put_below(model: PeftModel, below: AdapterFile | None) -> None:
    """Have an adapter in a model run on top of a shared one.

    Raises:
        CheckpointError: the shared one does not fit the model. UnsupportedError: the two cannot act together.

    """
    if below is not None:
        model.load_adapter(below, SHARED)
        model.set_adapter([SHARED, PERSONAL], inference_mode=True)


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


def load_fitting_base(
    file: AdapterFile, source: str, revision: str | None, dtype: str | None, more: Mapping[str, Any] | None = None
) -> Any:
    """The base with its weights, in the class that the adapter was trained with.

    Args:
        file: the adapter.
        source: the base's folder or hub id.
        revision: of a hub id.
        dtype: a name of ``DTYPES``; None: as the weights are stored.
        more: other arguments of transformers' ``from_pretrained``.

    Raises:
        CheckpointError: the adapter is of another base, or the weights are not there.

    """
    folder = located(source)
    cls: Any = type(fitting_base(file, folder, revision, built_in={}).model)
    labels = head_labels(file)
    extra = {**(more or {}), **({} if labels is None else {"num_labels": labels})}
    try:
        model, found = cls.from_pretrained(
            folder,
            revision=revision or "main",
            dtype=DTYPES[dtype] if dtype else "auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # of a head that the adapter replaces; anything else is refused below
            output_loading_info=True,
            **extra,
        )
    except Exception as error:  # transformers raises a dozen unrelated kinds for files that are not there or broken
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot load the weights of the base {source!r} from safetensors: {reason}") from error
    brought = file.config.modules_to_save or ()
    brought = (*brought, *_heads(file))
    lacking = [key for key in sorted(found["missing_keys"]) if not inside(brought, key)]
    shapes = [entry for entry in found["mismatched_keys"] if not inside(brought, entry[0])]
    faults = [f"{key}: not in the base's files" for key in lacking]
    faults += [
        f"{key}: {tuple(in_file)} in the file, {tuple(wanted)} in {cls.__name__}" for key, in_file, wanted in shapes
    ]
    if faults:
        raise CheckpointError(gather(f"the base {source!r} lacks weights that the adapter does not bring:", faults))
    return model


def _heads(file: AdapterFile) -> list[str]:
    """The heads that the adapter's task trains whole and that are in its file."""
    heads = HEADS.get(file.config.task_type or "", ())
    return [head for head in heads if any(key.startswith(f"{head}.") for key in file.tensors)]


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
