"""A joint training on disk, so that it goes on after it was killed at any moment.

::

    folder/
      run.json             which training this is: its id, settings, configuration, base
      state.safetensors    the users in training as they were after a joint step: rows, AdamW's m and v, where they are
      finished.jsonl       a line for each user that has ended, written once its adapter is where it goes
      .lock                held by the process that trains; it lets go of it however it ends

The state is written beside itself and renamed. A user ends in this order: its adapter is acknowledged by the sink, its
line is on disk, it leaves the state. Killed between the first two, the sink is asked whether it has the adapter; killed
before the state is written anew, the lines say who of it has ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, final

from safetensors.torch import save
from torch import Tensor

from ...adapter_files.files import read_weights, tensors_checksum
from ...errors import CheckpointError, ConfigError, gather
from ...whole_file import flush, hold, holder, replacing
from .users import UserReport

__all__ = ["StateFolder"]

RUN_NAME, STATE_NAME, FINISHED_NAME, LOCK_NAME = "run.json", "state.safetensors", "finished.jsonl", ".lock"
FORMAT = 1
FREE = ("users_per_step", "capacity", "save_every")  # settings that change no adapter


@final
class StateFolder:
    """The files of one joint training.

    Args:
        folder: made where it is not there.
        identity: what the training is, in JSON types; a resumed one must be the same.
        resume: go on with the training in the folder, if there is one.

    Attributes:
        run: the training's id. finished: who has ended, in order.

    Raises:
        ConfigError: there is a training and ``resume`` is False, or it is another one, or a process is at it now.
        CheckpointError: damaged files.

    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any], resume: bool) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"folder: cannot make {self.folder} for the state: {error.strerror}") from error
        self._lock = _locked(self.folder)
        self.finished: list[UserReport] = []
        self.steps = 0
        try:
            self._begin(identity, resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process go on with it."""
        self._lock.close()

    def _begin(self, identity: Mapping[str, Any], resume: bool) -> None:
        there = self.folder / RUN_NAME
        if there.exists():
            if not resume:
                raise ConfigError(
                    f"{self.folder} holds a joint training; go on with it (resume=True, or --resume), or take another "
                    "folder"
                )
            self.run = self._check(_json(there), identity)
            self.finished = self._read_finished()
        else:
            self.run = secrets.token_hex(16)
            text = json.dumps({"format": FORMAT, "run": self.run, **identity}, indent=1)
            _write(there, (text + "\n").encode())

    def _check(self, there: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
        """The id of the training that is there, if it is this one."""
        if there.get("format") != FORMAT:
            raise CheckpointError(f"{self.folder / RUN_NAME}: expected format {FORMAT}, got {there.get('format')!r}")
        mine, faults = json.loads(json.dumps(identity)), []
        for part, value in mine.items():
            other = there.get(part)
            if isinstance(value, dict) and isinstance(other, dict):
                keys = [key for key in {**value, **other} if key not in FREE and value.get(key) != other.get(key)]
                faults += [f"{part}.{key}: it has {other.get(key)!r}, this one {value.get(key)!r}" for key in keys]
            elif value != other:
                faults.append(f"{part}: it is another one")
        if faults:
            raise ConfigError(gather(f"the joint training in {self.folder} is another one than this:", faults))
        return str(there["run"])

    # -- who has ended -----------------------------------------------------------------------------

    def _read_finished(self) -> list[UserReport]:
        """The lines; one that was being written when the process was killed is cut off."""
        path = self.folder / FINISHED_NAME
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            found = [UserReport.from_dict(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return found

    def note(self, reports: Sequence[UserReport]) -> None:
        """Users have ended; on disk once this returns."""
        lines = "".join(json.dumps(report.to_dict()) + "\n" for report in reports)
        new = not (self.folder / FINISHED_NAME).exists()
        with (self.folder / FINISHED_NAME).open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush(self.folder)

    # -- who is in training ------------------------------------------------------------------------

    def save(self, steps: int, members: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Write the state: joint steps, the members in JSON types, and their rows in the same order."""
        told = json.dumps({"format": FORMAT, "run": self.run, "steps": steps, "members": list(members)})
        held = {key: value.cpu().contiguous() for key, value in tensors.items()}
        _write(self.folder / STATE_NAME, save(held, metadata={"joint": told, "sha256": _sum(told, held)}))

    def load(self) -> tuple[int, list[dict[str, Any]], dict[str, Tensor]]:
        """The inverse of :meth:`save`; nothing where nothing was written yet.

        Raises:
            CheckpointError: the file is damaged.

        """
        path = self.folder / STATE_NAME
        if not path.exists():
            return 0, [], {}
        tensors, metadata = read_weights(path)
        if metadata.get("sha256", "") not in ("", _sum(metadata.get("joint", ""), tensors)):  # older ones have none
            raise CheckpointError(f"{path} is not as it was written (its SHA-256 is another)")
        try:
            told = json.loads(metadata["joint"])
            if told["run"] != self.run:
                raise CheckpointError(f"{path} is of another training than {RUN_NAME}")
            return int(told["steps"]), list(told["members"]), tensors
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} is no state of a joint training: {error}") from error


def _locked(folder: Path) -> IO[bytes]:
    """A file that this process alone holds: two at one training would both write its state."""
    held = hold(folder / LOCK_NAME)
    if held is None:
        who = holder(folder / LOCK_NAME)
        raise ConfigError(f"folder: {who} is training in {folder} now; wait for it, or take another")
    return held


def _sum(told: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the members and all their numbers."""
    return hashlib.sha256(f"{tensors_checksum(tensors)} {told}".encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected an object")
    return found


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and on disk once this returns."""
    with replacing(path, flushed=True) as fresh:
        fresh.write_bytes(data)
