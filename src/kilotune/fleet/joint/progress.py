"""How far a joint training is, for whoever waits for it: lines, JSON lines, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TextIO, final

from ...errors import ConfigError, did_you_mean
from .users import Progress

__all__ = ["MODES", "told_by"]

MODES = ("plain", "json", "quiet")
BETWEEN = 2.0  # seconds between two lines that say how far it is


def told_by(
    mode: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> tuple[Callable[[Progress], None], ...]:
    """The listeners for a mode; plain writes to stderr, json to stdout, where ``stream`` does not say another place.

    Raises:
        ConfigError: no such mode.

    """
    if mode not in MODES:
        raise ConfigError(f"progress: expected one of {', '.join(MODES)}, got {mode!r}.{did_you_mean(mode, MODES)}")
    if mode == "quiet":
        return ()
    return (_JsonLines(stream or sys.stdout) if mode == "json" else _Lines(stream or sys.stderr, clock),)


@final
class _Lines:
    """A line now and then, and one for each user that failed."""

    def __init__(self, out: TextIO, clock: Callable[[], float]) -> None:
        self.out, self.clock, self.last = out, clock, float("-inf")

    def __call__(self, progress: Progress) -> None:
        if progress.kind == "failed":
            print(f"failed: {progress.name}: {progress.error}", file=self.out, flush=True)
        if progress.kind != "step" or self.clock() - self.last < BETWEEN:
            return
        self.last = self.clock()
        of = "" if progress.total is None else f" of {progress.total:,}"
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        loss = sum(progress.losses.values()) / len(progress.losses) if progress.losses else float("nan")
        print(
            f"{progress.done:,}{of} users done{failed}, {progress.active:,} in training; step {progress.step:,}, mean "
            f"loss {loss:.4g}, {progress.speed:,.0f} rows/s",
            file=self.out,
            flush=True,
        )


@final
class _JsonLines:
    """An object for each step, with the loss of each user in it, and for each user that ended."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def __call__(self, progress: Progress) -> None:
        document = {
            "event": progress.kind,
            "step": progress.step,
            "done": progress.done,
            "failed": progress.failed,
            "active": progress.active,
            "total": progress.total,
            "rows": progress.rows,
            "rows_per_second": round(progress.speed, 3),
            "losses": progress.losses,
            "name": progress.name,
            "error": progress.error,
        }
        print(json.dumps(document), file=self.out, flush=True)
