"""The pictures of one training as PNG: loss, learning rate, gradients, metrics. Made from its history alone::

    pictures = draw(history.records, best_step=120)      # {"loss": b"...", "learning_rate": b"...", ...}

What was not measured is not drawn. matplotlib is needed: the extra ``train`` has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..._ui.charts import COLOURS, INK, STYLE, blank_figure, png, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw"]

OWN = ("kind", "step", "epoch", "seconds", "tokens", "rows", "memory")  # of a record, beside what was measured
MANY = 60  # points, from which on a line is drawn through their means
MOST = 2000  # points of a line; more are drawn as means of neighbours
WIDE = 20.0  # the largest loss over the least, from which on the scale is logarithmic
Record = Mapping[str, Any]
Points = tuple[list[float], list[float]]


def draw(history: Sequence[Record], best_step: int | None = None) -> dict[str, bytes]:
    """The pictures by name; a name is missing where nothing of it was measured.

    Args:
        history: the records of :class:`kilotune.train.running.history.History`.
        best_step: whose weights are the result; marked.

    """
    import matplotlib as mpl

    found = {
        "loss": _loss(history, best_step),
        "learning_rate": _one(history, "learning_rate", "learning rate"),
        "gradient": _one(history, "grad_norm", "gradient norm"),
        "metrics": _metrics(history, best_step),
    }
    with mpl.rc_context(STYLE):
        return {name: png(make()) for name, make in found.items() if make is not None}


def points(history: Sequence[Record], kind: str, name: str) -> Points:
    """(steps, values) of what was measured in records of a kind; the last of each step."""
    found = {
        float(r["step"]): float(r[name]) for r in history if r["kind"] == kind and isinstance(r.get(name), int | float)
    }
    steps = sorted(found)
    return steps, [found[step] for step in steps]


def _loss(history: Sequence[Record], best_step: int | None) -> Callable[[], Any] | None:
    train, validation = points(history, "train", "loss"), points(history, "validation", "loss")
    if not train[0] and not validation[0]:
        return None

    def make() -> Any:
        figure = blank_figure(8.0, 3.6)
        axis = figure.subplots()
        if train[0]:
            _line(axis, train, COLOURS[0], "train")
        if validation[0]:
            axis.plot(*validation, color=COLOURS[1], marker="o", markersize=4, linewidth=1.4, label="validation")
        _mark(axis, validation, best_step)
        finite = [value for value in (*train[1], *validation[1]) if math.isfinite(value)]
        if finite and min(finite) > 0 and max(finite) / min(finite) > WIDE:
            axis.set_yscale("log")
        axis.set_ylabel("loss")
        _finish(axis)
        return figure

    return make


def _one(history: Sequence[Record], name: str, label: str) -> Callable[[], Any] | None:
    there = points(history, "train", name)
    if not there[0]:
        return None

    def make() -> Any:
        figure = blank_figure(8.0, 2.4)
        axis = figure.subplots()
        if name == "learning_rate":  # exact, so nothing is to be smoothed
            axis.plot(*_thinned(there), color=COLOURS[0], linewidth=1.6)
            axis.set_ylim(bottom=0)
        else:
            _line(axis, there, COLOURS[0], "")
        axis.set_ylabel(label)
        _finish(axis)
        return figure

    return make


def _metrics(history: Sequence[Record], best_step: int | None) -> Callable[[], Any] | None:
    known = dict.fromkeys(n for r in history if r["kind"] == "validation" for n in r if n not in (*OWN, "loss"))
    series = {name: points(history, "validation", name) for name in known}
    series = {name: each for name, each in series.items() if each[0]}
    if not series:
        return None

    def make() -> Any:
        rows = math.ceil(len(series) / 2)
        figure = blank_figure(8.0, 2.5 * rows)
        axes = figure.subplots(rows, min(2, len(series)), squeeze=False).flatten()
        for axis, (name, each) in zip(axes, series.items()):
            axis.plot(*each, color=COLOURS[1], marker="o", markersize=4, linewidth=1.4)
            _mark(axis, each, best_step, "")
            axis.set_title(name.replace("_", " "), loc="left", fontweight="bold", fontsize=10)
            _finish(axis)
        for axis in axes[len(series) :]:
            axis.set_visible(False)
        return figure

    return make


def _line(axis: Axes, there: Points, colour: str, label: str) -> None:
    """A line; where there are many points they are pale, and their running mean is drawn over them."""
    steps, values = _thinned(there)
    if len(steps) < MANY:
        axis.plot(steps, values, color=colour, linewidth=1.4, label=label, marker="o" if len(steps) == 1 else "")
        return
    axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
    width = len(values) // 20
    means = [_mean(values[max(0, i - width) : i + width + 1]) for i in range(len(values))]
    axis.plot(steps, means, color=colour, linewidth=1.8, label=label)


def _thinned(there: Points) -> Points:
    """At most :data:`MOST` points: means of as many neighbours as that takes."""
    steps, values = there
    size = -(-len(steps) // MOST)
    starts = range(0, len(steps), max(1, size))
    return [_mean(steps[i : i + size]) for i in starts], [_mean(values[i : i + size]) for i in starts]


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN, which is not drawn, where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _mark(axis: Axes, there: Points, step: int | None, label: str = "kept") -> None:
    """A ring around the value at the step whose weights were kept."""
    if step in there[0]:
        value = there[1][there[0].index(float(step))]
        axis.plot([step], [value], "o", markersize=10, markerfacecolor="none", color=INK, label=label)


def _finish(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("step")
    axis.margins(x=0.02)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axis)
    if any(line.get_label() and not str(line.get_label()).startswith("_") for line in axis.get_lines()):
        axis.legend(frameon=False)
