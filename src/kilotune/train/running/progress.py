"""How far a training is, for whoever waits for it: a bar, lines, JSON lines, or nothing.

``progress_for("auto")`` gives the listener for a mode of ``logging.progress``; hand it to ``watching`` (events.py)::

    bar     a line that moves, with loss, learning rate, speed, memory and time left; evaluations stay above it
    plain   a line for each logged loss, each evaluation and each checkpoint, and one for every half minute without
    json    one JSON object a line: {"event": "train", "step": 10, "steps": 300, "loss": 2.31, ...}
    quiet   nothing
    auto    bar where stderr is a terminal and rich is installed, else plain

All but json write to stderr. json writes to stdout, where a caller that wants stdout for itself passes ``stream``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO, final

from ...errors import ConfigError, MissingExtraError, did_you_mean
from ...model.parameter_report import readable_bytes
from .events import Event, Listener

__all__ = ["MODES", "progress_for", "readable_seconds"]

MODES = ("auto", "bar", "plain", "json", "quiet")
SPARSE = ("step", "evaluating")  # too many to write a line for each
SILENCE = 30.0  # seconds without a line
BETWEEN = 0.1  # seconds between two drawings of the bar
SHOWN = ("loss", "learning_rate", "grad_norm")


def progress_for(
    mode: str,
    *,
    stream: TextIO | None = None,
    better: tuple[str, bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Listener:
    """The listener that shows how far it is.

    Args:
        mode: one of :data:`MODES`.
        stream: where to write; None: stdout for json, stderr for all others.
        better: the metric that decides which evaluation is best, and whether more is better; marks the best one.
        clock: seconds, from any start.

    Raises:
        ConfigError: no such mode.
        MissingExtraError: a bar is asked for and rich is not installed.

    """
    if mode not in MODES:
        raise ConfigError(
            f"logging.progress: expected one of {', '.join(MODES)}, got {mode!r}.{did_you_mean(mode, MODES)}"
        )
    if mode == "quiet":
        return _Quiet()
    if mode == "json":
        return _JsonLines(stream or sys.stdout)
    out = stream or sys.stderr
    if mode == "bar" or (mode == "auto" and out.isatty() and _has_rich()):
        return _Bar(out, _Best(better), clock)
    return _Lines(out, _Best(better), clock)


def readable_seconds(seconds: float) -> str:
    """``9.4 s``, ``45 s``, ``2:05``, ``1:02:03``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole >= 172800:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _has_rich() -> bool:
    try:
        import rich.progress  # noqa: F401
    except Exception:  # a broken optional package must not break a training
        return False
    return True


# -- words ---------------------------------------------------------------------------------------------


@final
class _Best:
    """Knows the best evaluation so far."""

    def __init__(self, better: tuple[str, bool] | None) -> None:
        self.name, self.more = better or ("", False)
        self.best: float | None = None

    def mark(self, values: Mapping[str, float]) -> str:
        """`` (best so far)`` if it is."""
        value = values.get(self.name)
        if value is None or math.isnan(value):
            return ""
        if self.best is not None and not (value > self.best if self.more else value < self.best):
            return ""
        self.best = value
        return " (best so far)"


def _number(name: str, value: float) -> str:
    if name == "learning_rate":
        return f"{value:.2e}"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e12 else f"{value:.4g}"


def _values(values: Mapping[str, float]) -> str:
    names = {"learning_rate": "lr", "grad_norm": "gradient"}
    order = [*(name for name in SHOWN if name in values), *(name for name in values if name not in SHOWN)]
    finite = {name: _number(name, values[name]) if math.isfinite(values[name]) else str(values[name]) for name in order}
    return ", ".join(f"{names.get(name, name.replace('_', ' '))} {finite[name]}" for name in order)


def _speed(event: Event) -> str:
    rate = event.speed
    return f"{rate:,.0f} {event.unit}/s" if rate >= 10 else f"{rate:.2g} {event.unit}/s"


def _costs(event: Event) -> list[str]:
    """Speed, memory and time left, as far as they are known."""
    found = [_speed(event)] if event.seen else []
    found += [readable_bytes(event.memory)] if event.memory else []
    left = event.seconds_left
    return found if left is None else [*found, f"{readable_seconds(left)} left"]


def _sentence(event: Event, best: _Best) -> str:
    """What a line says of an event; the empty string where there is nothing to say."""
    if event.kind == "start":
        onward = f", going on from step {event.first}" if event.first else ""
        return f"training: {event.steps:,} steps, {event.epochs:g} epochs{onward}"
    if event.kind == "train":
        told = [_values(event.values), *_costs(event)]
        return f"step {event.step:,}/{event.steps:,} (epoch {event.epoch:.2f}): {', '.join(told)}"
    if event.kind in ("validation", "test"):
        mark = best.mark(event.values) if event.kind == "validation" else ""
        return f"{event.kind} at step {event.step:,}: {_values(event.values)}{mark}"
    if event.kind == "save":
        return f"checkpoint at step {event.step:,}"
    if event.kind == "end":
        parts = [f"{event.step - event.first:,} steps in {readable_seconds(event.seconds)}"]
        parts += [f"mean loss {event.values['loss']:.4g}"] if "loss" in event.values else []
        return f"done: {', '.join(parts + ([_speed(event)] if event.seen else []))}"
    return ""


def _meantime(event: Event) -> str:
    """How far it is, where nothing has been said for long."""
    if event.kind == "evaluating":
        return f"evaluating at step {event.step:,}: {_batch(event)}"
    return f"step {event.step:,}/{event.steps:,} (epoch {event.epoch:.2f}): {', '.join(_costs(event))}"


def _batch(event: Event) -> str:
    of = f"/{event.values['of']:.0f}" if "of" in event.values else ""
    return f"batch {event.values['done']:.0f}{of}"


# -- listeners -----------------------------------------------------------------------------------------


@final
class _Quiet(Listener):
    def hear(self, event: Event) -> None: ...

    def close(self) -> None: ...


@final
class _Lines(Listener):
    def __init__(self, out: TextIO, best: _Best, clock: Callable[[], float]) -> None:
        self.out, self.best, self.clock = out, best, clock
        self.said = clock()

    def hear(self, event: Event) -> None:
        text = _sentence(event, self.best)
        if not text and self.clock() - self.said >= SILENCE:
            text = _meantime(event)
        if text:
            print(text, file=self.out, flush=True)
            self.said = self.clock()

    def close(self) -> None: ...


@final
class _JsonLines(Listener):
    def __init__(self, out: TextIO) -> None:
        self.out = out

    def hear(self, event: Event) -> None:
        if event.kind in SPARSE:
            return
        document: dict[str, Any] = {
            "event": event.kind,
            "step": event.step,
            "steps": event.steps,
            "epoch": round(event.epoch, 6),
            "seconds": round(event.seconds, 3),
            "seconds_left": None if event.seconds_left is None else round(event.seconds_left, 3),
            event.unit: event.seen,
            f"{event.unit}_per_second": round(event.speed, 3),
            "memory": event.memory,
            **{name: value if math.isfinite(value) else str(value) for name, value in event.values.items()},
        }
        print(json.dumps(document, allow_nan=False), file=self.out, flush=True)

    def close(self) -> None: ...


@final
class _Bar(Listener):
    """rich's progress, drawn from the training's own thread: a thread of its own would be there when workers fork."""

    def __init__(self, out: TextIO, best: _Best, clock: Callable[[], float]) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        except ImportError as error:
            raise MissingExtraError("rich", "cli", "logging.progress: bar") from error
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
        )
        console = Console(file=out, highlight=False)
        self.bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self.best, self.clock = best, clock
        self.task: Any = None
        self.drawn, self.values = -BETWEEN, ""

    def hear(self, event: Event) -> None:
        if event.kind == "start":
            self.bar.start()
            self.task = self.bar.add_task("training", total=event.steps, completed=event.step, told="")
        if event.kind == "train":
            self.values = _values({name: event.values[name] for name in SHOWN[:2] if name in event.values})
        elif event.kind not in SPARSE and (text := _sentence(event, self.best)):
            self.bar.console.print(text, markup=False, soft_wrap=True)
        if self.task is not None:
            self._move(event)

    def _move(self, event: Event) -> None:
        told = ", ".join([*([self.values] if self.values else []), *_costs(event)])
        if event.kind == "evaluating":
            told = f"evaluating: {_batch(event)}"
        self.bar.update(self.task, completed=event.step, told=told)
        last = event.kind == "step" and event.step == event.steps
        if last or self.clock() - self.drawn >= BETWEEN:
            self.bar.refresh()
            self.drawn = self.clock()
        if event.kind == "end":
            self.close()

    def close(self) -> None:
        if self.task is not None:
            self.bar.stop()
            self.task = None
