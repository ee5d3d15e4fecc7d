"""Finished runs on disk, a JSON line each, so that a search that was interrupted goes on where it was.

The first line says with what settings the runs were made; runs of other settings are never mixed in. A line that
was being written when the process died has no end, and is dropped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, final

from ..errors import CheckpointError, ConfigError, KilotuneError, ResourceError, gather

__all__ = ["FULL", "START", "Journal", "Key", "Record", "Run", "RunStore"]

FULL = "full"
START = "start"
FORMAT = 1


class Record(Protocol):
    """What one finished run came to."""

    @property
    def key(self) -> Hashable:
        """What was run."""

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""


R = TypeVar("R", bound=Record)


@final
@dataclass(frozen=True)
class Key:
    """What one run is.

    Attributes:
        way: "did", "said", "full" (everything is trained) or "start" (nothing is).
        d: how many numbers are trained in the subspace; 0 where there is none.
        rate: learning rate; 0 where nothing is trained.
        seed: of the weights, the projection and the order of the data.
    """

    way: str
    d: int
    rate: float
    seed: int


@final
@dataclass(frozen=True)
class Run:
    """One finished run. The scores are None where the training diverged.

    Attributes:
        key: what was run.
        validation: its score on the validation data.
        test: its score on the test data.
        loss: on the validation data.
        seconds: it took.
    """

    key: Key
    validation: float | None
    test: float | None
    loss: float | None
    seconds: float

    @property
    def value(self) -> float:
        """The validation score; minus infinity where the training diverged."""
        return -math.inf if self.validation is None else self.validation

    def to_dict(self) -> dict[str, Any]:
        """Flat, in plain JSON types."""
        plain = dataclasses.asdict(self)
        return {**plain.pop("key"), **plain}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Run:
        """The reverse of :meth:`to_dict`.

        Raises:
            ValueError: something is missing, too much, or no number.
        """
        way, d, rate, seed = (plain[name] for name in ("way", "d", "rate", "seed"))
        scores = [plain[name] for name in ("validation", "test", "loss")]
        whole = type(d) is int and type(seed) is int
        numbers = [rate, plain["seconds"], *(value for value in scores if value is not None)]
        if len(plain) != 8 or type(way) is not str or not whole or not all(type(n) in (int, float) for n in numbers):
            raise ValueError
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        validation, test, loss = scores
        return cls(Key(way, d, float(rate), seed), validation, test, loss, plain["seconds"])


class Journal(Generic[R]):
    """Finished runs, of any kind of record.

    Args:
        path: the file; None keeps the runs in memory only.
        settings: all that decides the numbers of a run beside its key, in plain JSON types.
        parse: makes a record of a line's values; a ValueError, KeyError or TypeError says that it is none.
        restart: forget what is in the file.

    Raises:
        ConfigError: the file's runs were made with other settings.
        CheckpointError: the file is damaged.
    """

    def __init__(
        self,
        path: Path | None,
        settings: Mapping[str, Any],
        parse: Callable[[Mapping[str, Any]], R],
        restart: bool = False,
    ) -> None:
        self.path, self.reused, self._parse = path, 0, parse
        self._settings: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **settings}))
        self._runs: dict[Hashable, R] = {}
        self._good = 0  # bytes of whole lines in the file
        self._size = path.stat().st_size if path is not None and path.exists() else 0  # as this store left the file
        if path is not None and not restart and path.exists():
            self._read(path)

    @property
    def count(self) -> int:
        """How many finished runs there are."""
        return len(self._runs)

    def get(self, key: Hashable) -> R | None:
        """The finished run, or None."""
        return self._runs.get(key)

    def add(self, run: R) -> None:
        """Keep a run; it is on disk when this returns.

        Raises:
            KilotuneError: it cannot be written.
        """
        self._runs[run.key] = run
        if self.path is None:
            return
        lines = [] if self._good else [json.dumps({"settings": self._settings})]
        text = "".join(f"{line}\n" for line in [*lines, json.dumps(run.to_dict(), allow_nan=False)]).encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("r+b" if self.path.exists() else "xb") as out:
                if (size := out.seek(0, os.SEEK_END)) != self._size:
                    raise KilotuneError(
                        f"{self.path} has {size} bytes, and this search left it at {self._size}: another process writes"
                        " to it; run one search at a time in a folder, or choose another (--out)"
                    )
                out.seek(self._good)
                out.truncate()  # a line without an end, or the runs that were to be forgotten
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise ResourceError(f"could not keep a finished run in {self.path}: {error}") from error
        self._good = self._size = self._good + len(text)

    def _read(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise KilotuneError(f"could not read the finished runs: {error}") from error
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                plain = json.loads(line)
                if number > 1:
                    run = self._parse(plain)
                    self._runs[run.key] = run
                    continue
                found = plain["settings"]
                if not isinstance(found, dict):
                    raise ValueError
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{path}, line {number}: this is no finished run of kilotune; mend or remove the line, give"
                    " --restart to begin anew, or take another folder"
                ) from error
            self._check(path, found)
        self._good, self._size, self.reused = len(whole), len(content), len(self._runs)

    def _check(self, path: Path, found: Mapping[str, Any]) -> None:
        faults = [
            f"{name}: {there} there, {here} now"
            for name in sorted({*found, *self._settings})
            if (there := json.dumps(found.get(name))) != (here := json.dumps(self._settings.get(name)))
        ]
        if faults:
            head = f"the finished runs in {path} were made with other settings; take another folder (--out), or give"
            raise ConfigError(gather(f"{head} --restart to discard them:", faults))


@final
class RunStore(Journal[Run]):
    """The finished runs of one task, for the search for an intrinsic dimension; see :class:`Journal`."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any], restart: bool = False) -> None:
        super().__init__(path, settings, Run.from_dict, restart)
