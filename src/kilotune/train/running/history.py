"""What a training measured, on disk while it runs: ``history.jsonl``, and the same as ``history.csv``.

One record a line, flat: ``kind`` (train, validation, test, end), ``step``, ``epoch``, ``seconds`` (of all sessions),
``tokens`` or ``rows`` of this session, ``memory`` in bytes, and what was measured: ``loss``, ``learning_rate``,
``grad_norm``, the metrics. A number that is not finite is written as ``"nan"``, ``"inf"`` or ``"-inf"``, for JSON has
none. A record is on disk before the next step begins, and a line that a kill cut in two is dropped by who reads it::

    history = History(output / "logs", resume_step=400)   # None for a new run; what is after step 400 is dropped
    ...                                                    # give it to watching(), see events.py
    history.records                                        # the list of dicts, for the result and the report
    read_history(output / "logs" / "history.jsonl")        # later

TensorBoard's files are written by transformers' own callback, which ``tensorboard_callback(folder)`` makes, in the main
process only.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, final

from ...errors import CheckpointError, KilotuneError, MissingExtraError
from ..trainer.output_folder import write_text
from .events import Event, Listener

__all__ = ["CSV_NAME", "JSONL_NAME", "History", "read_history", "tensorboard_callback"]

JSONL_NAME, CSV_NAME = "history.jsonl", "history.csv"
KINDS = ("train", "validation", "test", "end")
AFTER = ("test", "end")  # written once the steps are done: a run that goes on writes them again
FIRST = ("kind", "step", "epoch", "seconds", "tokens", "memory", "loss", "learning_rate", "grad_norm")
Record = dict[str, Any]


@final
class History(Listener):
    """Writes every measurement down.

    Args:
        folder: made if it is not there.
        resume_step: the step that the training goes on from, whose records and earlier ones stay; None starts afresh.
        csv: whether to write history.csv too.

    Raises:
        KilotuneError: the folder cannot be written to, or what is there cannot be read.

    """

    def __init__(self, folder: Path, *, resume_step: int | None = None, csv: bool = True) -> None:
        self.path, self.csv_path = folder / JSONL_NAME, folder / CSV_NAME if csv else None
        self.records: list[Record] = []
        if resume_step is not None and self.path.exists():
            kept = (r for r in read_history(self.path) if r["step"] <= resume_step and r["kind"] not in AFTER)
            self.records = list(kept)
        self.before = max((float(record["seconds"]) for record in self.records), default=0.0)
        self.columns = _columns(self.records)
        self.file: TextIO | None = None
        self.begun = False

    def hear(self, event: Event) -> None:
        if event.kind == "start":
            self._begin()
        if event.kind in KINDS:
            self.add(
                {
                    "kind": event.kind,
                    "step": event.step,
                    "epoch": round(event.epoch, 6),
                    "seconds": round(self.before + event.seconds, 3),
                    event.unit: event.seen,
                    "memory": event.memory,
                    **event.values,
                }
            )

    def add(self, record: Mapping[str, Any]) -> None:
        """Write one record, which has ``kind``, ``step`` and ``seconds``, down.

        Raises:
            KilotuneError: it cannot be written, as on a full disk.

        """
        self._begin()
        self.records.append(dict(record))
        with _told(self.path):
            if self.file is None:
                self.file = self.path.open("a", encoding="utf-8")
            try:
                self.file.write(_line(record))
                self.file.flush()
            except OSError:
                self.close()
                raise
        fresh = [name for name in record if name not in self.columns]
        self.columns += fresh
        if fresh:
            self._whole_csv()  # the header has to grow: once for each kind of record
        elif self.csv_path is not None:
            with _told(self.csv_path), self.csv_path.open("a", encoding="utf-8", newline="") as file:
                file.write(_csv_rows([record], self.columns))

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written was told when it was
                self.file.close()
            self.file = None

    def _begin(self) -> None:
        """Put down what is kept of an earlier session. Not before something happens: only the main process hears."""
        if self.begun:
            return
        self.begun = True
        with _told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(_line(record) for record in self.records))
        self._whole_csv()

    def _whole_csv(self) -> None:
        if self.csv_path is not None:
            with _told(self.csv_path):
                write_text(self.csv_path, ",".join(self.columns) + "\n" + _csv_rows(self.records, self.columns))


def read_history(path: Path) -> list[Record]:
    """The records of a history.jsonl, numbers that are not finite as floats; a last line without its end is left out.

    Raises:
        CheckpointError: a line is no record; names file and line.
        KilotuneError: the file cannot be read.

    """
    with _told(path, "read"):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last end of a line was cut off
        try:
            record = json.loads(line)
            plain = {name: _number(value) for name, value in record.items()}
            if plain["kind"] not in KINDS or not isinstance(plain["step"], int) or "seconds" not in plain:
                raise ValueError("kind, step or seconds")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}:{number}: expected a record of a training, got {line[:80]!r}") from error
        records.append(plain)
    return records


def tensorboard_callback(folder: Path, resume_step: int | None = None) -> Any:
    """The ``TensorBoardCallback`` of transformers, writing into ``folder``; what is after ``resume_step`` is hidden.

    Raises:
        MissingExtraError: tensorboard is not installed.

    """
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "logging.tensorboard") from error
    purge = None if resume_step is None else resume_step + 1
    return TensorBoardCallback(SummaryWriter(str(folder), purge_step=purge))


# -- text ----------------------------------------------------------------------------------------------


def _columns(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys([*FIRST, *(name for record in records for name in record)]))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _csv_rows(records: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([_plain(record.get(name, "")) for name in columns] for record in records)
    return out.getvalue()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


# -- files ---------------------------------------------------------------------------------------------


@final
class _told:
    """What the system says of a file becomes our error, which names the file."""

    def __init__(self, path: Path, verb: str = "write") -> None:
        self.path, self.verb = path, verb

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            raise KilotuneError(f"cannot {self.verb} {self.path}: {error.strerror or error}") from error
