"""The output folder of a fine-tuning: what is in it, what may be overwritten, and what can be gone on from.

::

    output/
      adapter_config.json, adapter_model.safetensors     the result, and the tokenizer's files beside it
      kilotune-train.yaml                                the settings as run
      result.json                                        the numbers, written last
      checkpoints/run.json                               what the run began with: held against it before a resume
      checkpoints/checkpoint-120/                        adapter, optimizer, schedule, RNG, data position, checksums
      checkpoints/.lock                                  held by the process that trains
      logs/, plots/, report.html                         see running/history.py, results/report.py

transformers writes ``trainer_state.json`` last, so a checkpoint in which that can be read is whole; others are what a
kill or a full disk left, and are passed over. The checksums come behind it: older checkpoints have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...adapter_files.files import CONFIG_NAME, WEIGHTS_NAME
from ...errors import CheckpointError, ConfigError, first_line, gather
from ...whole_file import hold, holder, let_go, replacing
from ..settings.sections import SECTIONS, TrainSettings

__all__ = [
    "CHECKPOINTS",
    "SETTINGS_NAME",
    "alone",
    "base_digest",
    "base_of_run",
    "check_same_run",
    "clear",
    "damage_of",
    "find",
    "fingerprint",
    "held_of_run",
    "is_finished",
    "newest",
    "processes",
    "refuse_overwriting",
    "state_of",
    "write_checksums",
    "write_json",
    "write_record",
    "write_text",
]

CHECKPOINTS, LOGS, PLOTS = "checkpoints", "logs", "plots"
SETTINGS_NAME, RESULT_NAME, RECORD_NAME, STATE_NAME, SUMS_NAME, LOCK_NAME = (
    "kilotune-train.yaml",
    "result.json",
    "run.json",
    "trainer_state.json",
    "checksums.json",
    ".lock",
)
OWN = (CONFIG_NAME, WEIGHTS_NAME, SETTINGS_NAME, RESULT_NAME, "report.html", CHECKPOINTS, LOGS, PLOTS)
FORMAT = 1
PATTERN = re.compile(r"checkpoint-(\d+)")
# What may be another at a resume, for it changes no weight.
FREE = (
    "output",
    "training.keep_checkpoints",
    "training.workers",
    "training.device",
    "logging.progress",
    "logging.csv",
    "logging.tensorboard",
    "logging.report",
)


# -- the folder ----------------------------------------------------------------------------------------


def refuse_overwriting(folder: Path, sources: Mapping[str, str], *, resume: bool, force: bool) -> None:
    """Refuse an output folder that is in use, or that is read from.

    Args:
        folder: the output.
        sources: setting -> path of what the training reads.
        resume, force: what the user said.

    Raises:
        ConfigError: it is a file; it cannot be written; it is or contains a source; it is there and neither ``resume``
            nor ``force``; nothing in it can be resumed.

    """
    if resume and force:
        raise ConfigError("resume goes on with what is there, and force starts anew: give one of them")
    whole = folder.resolve()
    for name, source in sources.items():
        path = Path(source)
        if path.exists() and (whole == path.resolve() or whole in path.resolve().parents):
            raise ConfigError(
                f"output: {folder} is, or contains, {name} ({source}), which is read; take another folder"
            )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; expected a folder, or nothing")
    place = next(path for path in (whole, *whole.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = f"{place} is a file" if not place.is_dir() else f"nobody but its owner may write into {place}"
        raise ConfigError(f"output: {folder} cannot be written: {why}; take another folder")
    if resume and not (folder / CHECKPOINTS / RECORD_NAME).is_file():
        raise ConfigError(f"output: there is no training in {folder} to go on with; start it without --resume")
    if not resume and not force and folder.is_dir() and any(folder.iterdir()):
        hint = "--resume goes on with it, " if (folder / CHECKPOINTS / RECORD_NAME).is_file() else ""
        raise ConfigError(
            f"output: {folder} is there and not empty; {hint}--force starts anew in it, or take another folder"
        )


def clear(folder: Path) -> None:
    """Take away what an earlier training wrote there; other people's files stay."""
    for name in OWN:
        path = folder / name
        for item in path.iterdir() if name == CHECKPOINTS and path.is_dir() else [path]:
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item.name != LOCK_NAME:
                item.unlink(missing_ok=True)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from training in the folder: two would write one another's checkpoints and logs over.

    Raises:
        ConfigError: one is at it.

    """
    place = folder / CHECKPOINTS / LOCK_NAME
    held = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        held = hold(place)
        taken = held is None
    except OSError:  # nothing can be written there: what is written next says so
        taken = False
    if taken:
        raise ConfigError(f"output: {holder(place)} is training in {folder} now; wait for it, or take another folder")
    try:
        yield
    finally:
        if held is not None:
            let_go(held, place)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write the whole file, or leave what is there.

    Raises:
        OSError: it cannot be written.

    """
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same for text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8", newline="\n")


# -- checkpoints ---------------------------------------------------------------------------------------


def state_of(checkpoint: Path) -> dict[str, Any] | None:
    """The Trainer's state in a checkpoint; None where the checkpoint is not whole."""
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) and isinstance(state.get("global_step"), int) else None


def _all(folder: Path) -> Iterator[tuple[int, Path]]:
    """(step, folder) of all checkpoints in ``folder``, newest first."""
    found = [(PATTERN.fullmatch(path.name), path) for path in (folder.iterdir() if folder.is_dir() else ())]
    yield from sorted(((int(match.group(1)), path) for match, path in found if match and path.is_dir()), reverse=True)


def write_checksums(checkpoint: Path) -> None:
    """Write down what the files of a checkpoint are, once all of them are there.

    Raises:
        OSError: it cannot be written.

    """
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != SUMS_NAME)
    sums = {path.relative_to(checkpoint).as_posix(): _sha256(path) for path in files}
    write_json(checkpoint / SUMS_NAME, {"format": FORMAT, "sha256": sums})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _changed(checkpoint: Path) -> str | None:
    """What of a checkpoint is not as it was written; None: nothing, or nobody knows."""
    path = checkpoint / SUMS_NAME
    if not path.exists():
        return None
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        for name, sha256 in sums.items():
            if _sha256(checkpoint / name) != sha256:
                return f"{name} is not as it was written (its SHA-256 is another)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{SUMS_NAME} cannot be read ({first_line(error)})"
    return None


def damage_of(checkpoint: Path, every_byte: bool = True) -> str | None:
    """What of a checkpoint is missing, cannot be read, or is not as it was written; None: nothing.

    Args:
        checkpoint: its folder.
        every_byte: hold all files against their checksums, where it has some. Else only what tells whether a file has
            its beginning and its end is read, as a machine that lost its power leaves it.

    """
    if state_of(checkpoint) is None:
        return f"{STATE_NAME} cannot be read"
    weights = [*checkpoint.glob("model*.safetensors")]
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    if not weights or len(states) < 3:
        return f"{'model.safetensors' if not weights else 'rng_state.pth'} is missing"
    for path in (*weights, *states):
        try:
            with safe_open(path, framework="pt") if path in weights else zipfile.ZipFile(path):
                pass
        except FileNotFoundError:
            return f"{path.name} is missing"
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name} cannot be read ({first_line(error)})"
    return _changed(checkpoint) if every_byte else None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` whose files have their beginnings and ends: for what is said of it."""
    return next((path for _, path in _all(folder) if damage_of(path, every_byte=False) is None), None)


def find(folder: Path, drop: bool) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was written, and what is told of those that are passed over, a line each.

    Args:
        folder: of the checkpoints.
        drop: take away what a kill or a full disk left of checkpoints, and what is damaged otherwise.

    """
    found, told = None, []
    for _, path in _all(folder):
        if (damage := damage_of(path, every_byte=found is None)) is None:
            found = found or path
            continue
        if state_of(path) is not None or (path / SUMS_NAME).exists():  # it was whole once
            told.append(f"{path} is damaged, and passed over: {damage}")
        if drop:
            shutil.rmtree(path)
    if told and found is None:
        told.append("no other checkpoint is there, so the training begins anew")
    return found, told


def is_finished(state: Mapping[str, Any]) -> bool:
    """Whether nothing is left to train after a checkpoint: the last step is done, or it was stopped early."""
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {})
    stopped = bool(control.get("args", {}).get("should_training_stop", False)) if isinstance(control, dict) else False
    return stopped or int(state["global_step"]) >= int(state.get("max_steps", 0))


# -- the same run --------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, train: Any, tokens: int, fresh: Sequence[str] = ()) -> dict[str, Any]:
    """What tells whether a resumed run has the same base and the same data: counts, and samples of both.

    Args:
        model: without adapters, as it was loaded.
        train: the rows.
        tokens: of them.
        fresh: modules that are not the base's, but were drawn.

    """
    return {"rows": len(train), "tokens": tokens, "data": _rows_digest(train), "base": base_digest(model, fresh)}


def base_digest(model: nn.Module, fresh: Sequence[str] = (), tensors: int = 16, numbers: int = 256) -> str:
    """SHA-256 over the names and shapes of all weights but the ``fresh`` ones, and the first numbers of some."""
    own = tuple(f"{name}." for name in fresh)
    named = [(name, p) for name, p in model.named_parameters() if not p.is_meta and not name.startswith(own)]
    digest = hashlib.sha256(repr([(name, tuple(p.shape), str(p.dtype)) for name, p in named]).encode())
    for name, parameter in named[:: max(1, len(named) // tensors)]:
        part = parameter.detach().reshape(-1)[:numbers].cpu().contiguous()
        digest.update(name.encode())
        digest.update(part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _rows_digest(rows: Any, count: int = 16) -> str:
    """SHA-256 over what some rows are labelled with and, for text, made of."""
    digest = hashlib.sha256()
    for index in range(0, len(rows), max(1, len(rows) // count)):
        row = rows[index]
        if isinstance(row, Mapping):
            for name in sorted({"input_ids", "labels", "label"} & set(row)):
                digest.update(f"{name}={_plain(row[name])}".encode())
        elif isinstance(row, (tuple, list)) and row:
            digest.update(_plain(row[-1]).encode())
    return digest.hexdigest()


def _plain(value: Any) -> str:
    return repr(value.tolist() if isinstance(value, Tensor) else value)


def base_of_run(folder: Path, model: Mapping[str, Any]) -> str | None:
    """The digest of the base that a training in ``folder`` had, where there was one and it held its base alike.

    Args:
        folder: of the training.
        model: the model's settings, as plain values; weights held otherwise have other digests.

    """
    try:
        record = json.loads((folder / CHECKPOINTS / RECORD_NAME).read_text(encoding="utf-8"))
        alike = all(record["settings"]["model"][name] == model[name] for name in ("dtype", "quantization"))
        return str(record["base"]) if alike else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # the adapter may be from anywhere
        return None


def write_record(folder: Path, settings: TrainSettings, found: Mapping[str, Any]) -> None:
    """Write down what the run begins with.

    Raises:
        OSError: it cannot be written.

    """
    record = {"format": FORMAT, "settings": settings.to_dict(), "processes": processes(), **found}
    write_json(folder / CHECKPOINTS / RECORD_NAME, record)


def held_of_run(folder: Path) -> str | None:
    """How the run that began in ``folder`` held the weights of its base; None where none is there."""
    try:
        found = json.loads((folder / CHECKPOINTS / RECORD_NAME).read_text(encoding="utf-8")).get("held", "as saved")
    except (OSError, ValueError, AttributeError, RecursionError):  # what is wrong with it, check_same_run says
        return None
    return found if isinstance(found, str) else None


def note_rate(folder: Path, taken: Mapping[str, Any]) -> None:
    """Write down which learning rate the run has, for those who go on with it.

    Raises:
        OSError: it cannot be written.

    """
    path = folder / CHECKPOINTS / RECORD_NAME
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "rate": dict(taken)})


def noted_rate(folder: Path) -> Mapping[str, Any] | None:
    """What :func:`note_rate` wrote; None where the run was stopped before."""
    record = json.loads((folder / CHECKPOINTS / RECORD_NAME).read_text(encoding="utf-8"))
    found: Mapping[str, Any] | None = record.get("rate")
    return found


def processes() -> int:
    """How many processes there are, as torchrun and accelerate say."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1")))


def check_same_run(folder: Path, settings: TrainSettings, found: Mapping[str, Any] | None = None) -> None:
    """Hold settings, and data and base where they are given, against those that the run began with.

    Raises:
        ConfigError: something differs that changes the result; lists all of it.
        CheckpointError: the record cannot be read.

    """
    path = folder / CHECKPOINTS / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = _flat(record["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read, so nothing can be gone on from: {error}") from error
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {record.get('format')!r}; this version goes on from format {FORMAT}")
    now = _flat(json.loads(json.dumps(settings.to_dict())))
    faults = [
        f"{name}: it was {before.get(name)!r}, and is {now.get(name)!r}"
        for name in sorted({*before, *now} - set(FREE))
        if before.get(name) != now.get(name)
    ]
    if (before_count := record.get("processes", processes())) != processes():
        faults.append(f"the number of processes: it was {before_count}, and is {processes()}")
    if found is not None:
        names = {"rows": "the number of rows of train", "tokens": "the number of tokens of train"}
        faults += [
            f"{text}: it was {record.get(name)}, and is {found[name]}"
            for name, text in names.items()
            if record.get(name) != found[name]
        ]
        if not faults and record.get("data") != found["data"]:
            faults.append("the rows of train are others than before")
        held = [str(values.get("held", "as saved")) for values in (record, found)]
        if held[0] != held[1]:
            faults.append(
                f"how the weights of model.base are held: it was {held[0]}, and is {held[1]}; see model.dtype"
            )
        if record.get("base") != found["base"]:
            faults.append("model.base: its weights are not those that the run began with")
    if faults:
        raise ConfigError(
            gather(
                f"{folder} cannot be gone on with, because something is not as it was; start anew with --force:", faults
            )
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if name in SECTIONS else {name: value}
    return flat
