"""The pictures of a comparison: score over bytes, the seeds, the learning rates, the costs; as SVG or PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..._ui.charts import INK, STYLE, blank_figure, tidy
from .results import Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PICTURES", "draw"]

FRONT, OTHER, FULL_LENGTH = "#0072B2", "#8A919C", "#D55E00"
ACROSS = 4  # panels in a row of the learning rates
WIDE = 10.0  # a score that spans more than so many times its smallest is drawn on a logarithmic axis
DPI = 110
# Where a label may stand beside its point, in points: the first place that is free is taken.
PLACES = [(7, 0), (0, 9), (0, -9), (-7, 0), (7, 9), (7, -9), (-7, 9), (-7, -9), (0, 18), (0, -18), (14, 18), (14, -18)]


def draw(comparison: Comparison, name: str) -> dict[str, bytes]:
    """One of :data:`PICTURES`, as ``svg`` and as ``png``; equal comparisons give equal bytes."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = PICTURES[name](comparison)
        figure.draw_without_rendering()  # lays it out, once for both
        figure.set_layout_engine("none")
        return {kind: _saved(figure, kind) for kind in ("svg", "png")}


def _saved(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    quiet: dict[str, Any] = {"Date": None} if kind == "svg" else {}
    figure.savefig(out, format=kind, dpi=DPI, metadata=quiet)
    return out.getvalue()


def _factor(comparison: Comparison) -> int:
    return 100 if comparison.percent else 1


def _scored(comparison: Comparison) -> list[Row]:
    return [row for row in comparison.ranked if row.mean is not None]


def _score_axis(axis: Axes, comparison: Comparison, values: Sequence[float], which: str = "y") -> None:
    """A logarithmic axis where the scores are far apart; labelled by numbers, not powers."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    if comparison.percent or not values or min(values) <= 0 or max(values) < WIDE * min(values):
        return
    getattr(axis, f"set_{which}scale")("log")
    side = axis.yaxis if which == "y" else axis.xaxis
    side.set_major_locator(LogLocator(subs=(1, 2, 5)))
    side.set_major_formatter(ScalarFormatter())
    side.set_minor_formatter(NullFormatter())


# -- score over bytes --------------------------------------------------------------------------------


def _pareto(comparison: Comparison) -> Figure:
    """Mean score over bytes on disk, whiskers from the worst seed to the best, and the front as steps."""
    figure = blank_figure(9.0, 5.4)
    axis = figure.subplots()
    factor, front = _factor(comparison), comparison.front
    names = {row.name for row in front}
    for row in _scored(comparison):
        colour = FRONT if row.name in names else OTHER
        mean = factor * (row.mean or 0.0)
        reach = [[mean - factor * min(row.scores)], [factor * max(row.scores) - mean]]
        axis.errorbar(
            [row.costs.disk_bytes], [mean], reach, fmt="o", color=colour, elinewidth=0.9, capsize=2, markersize=6
        )
    axis.set_xscale("log")
    axis.set_xlabel("bytes on disk (log scale); up and to the left is better")
    axis.set_ylabel(f"test {comparison.unit}")
    _score_axis(axis, comparison, [row.mean or 0.0 for row in _scored(comparison)])
    if not comparison.larger_is_better:
        axis.invert_yaxis()
    axis.margins(0.12, 0.1)
    if front:
        where = [row.costs.disk_bytes for row in front]
        scores = [factor * (row.mean or 0.0) for row in front]
        end = axis.get_xlim()[1]
        axis.plot([*where, end], [*scores, scores[-1]], drawstyle="steps-post", color=FRONT, linewidth=1.0, alpha=0.5)
        axis.set_xlim(right=end)
    axis.set_title(comparison.title, loc="left", fontweight="bold", fontsize=10.5)
    tidy(axis)
    _label(figure, axis, [(row.name, row.costs.disk_bytes, factor * (row.mean or 0.0)) for row in _scored(comparison)])
    return figure


def _label(figure: Figure, axis: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside their points, such that none lies on another or on a point, as far as there is room."""
    from matplotlib.patheffects import withStroke

    halo = withStroke(linewidth=3, foreground="white")
    figure.draw_without_rendering()
    taken = []
    for _, x, y in points:
        at = axis.transData.transform((x, y))
        taken.append((at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5))
    for name, x, y in points:
        for place in PLACES:
            sides = {-1: "right", 0: "center", 1: "left"}
            text = axis.annotate(
                name,
                (x, y),
                place,
                textcoords="offset points",
                ha=sides[(place[0] > 0) - (place[0] < 0)],
                va={-1: "top", 0: "center", 1: "bottom"}[(place[1] > 0) - (place[1] < 0)],
                fontsize=9,
                path_effects=[halo],
            )
            text.set_in_layout(False)
            box = text.get_window_extent()
            ours = (box.x0, box.y0, box.x1, box.y1)
            if place == PLACES[-1] or not any(_overlap(ours, other) for other in taken):
                taken.append(ours)
                break
            text.remove()


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# -- seeds -------------------------------------------------------------------------------------------


def _scores(comparison: Comparison) -> Figure:
    """A line per contender, best at the top: a dot per seed, a bar at the mean."""
    rows = _scored(comparison)
    figure = blank_figure(9.0, 0.9 + 0.34 * max(1, len(rows)))
    axis = figure.subplots()
    factor = _factor(comparison)
    for place, row in enumerate(reversed(rows)):
        axis.plot(
            [factor * s for s in row.scores], [place] * len(row.scores), "o", color=FRONT, markersize=5, alpha=0.5
        )
        axis.plot([factor * (row.mean or 0.0)] * 2, [place - 0.28, place + 0.28], color=INK, linewidth=2)
    axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axis.set_xlabel(f"test {comparison.unit}; dots are seeds, bars their means")
    _score_axis(axis, comparison, [row.mean or 0.0 for row in rows], "x")
    if not comparison.larger_is_better:
        axis.invert_xaxis()
    tidy(axis)
    axis.grid(axis="x", color="#E3E6EA", linewidth=0.8)
    return figure


# -- learning rates ----------------------------------------------------------------------------------


def _rates(comparison: Comparison) -> Figure:
    """A panel per contender: validation score over learning rate, a line per length of the runs."""
    lines = max(1, math.ceil(len(comparison.rows) / ACROSS))
    figure = blank_figure(11.0, 0.6 + 2.1 * lines)
    panels = figure.subplots(lines, ACROSS, sharex=True, sharey=True, squeeze=False)
    low, high = _span(comparison)
    for axis, row in zip(panels.flat, comparison.rows, strict=False):
        _rate_panel(axis, comparison, row)
    for axis in panels.flat[len(comparison.rows) :]:
        axis.set_visible(False)
    first = panels[0][0]
    first.set_xscale("log")
    _score_axis(first, comparison, [low, high])
    first.set_ylim(*((low, high) if comparison.larger_is_better else (high, low)))
    figure.supxlabel(
        "learning rate (log scale); darker lines are longer runs, the circle is what was chosen", fontsize=9.5
    )
    figure.supylabel(f"validation {comparison.unit}", fontsize=9.5)
    return figure


def _span(comparison: Comparison) -> tuple[float, float]:
    """The validation scores to be shown: what is far worse than no training at all is cut off."""
    trials = [t for row in comparison.rows for t in row.searched if not t.diverged]
    values = [t.values["validation"] for t in trials] or [0.0, 1.0]
    start = fmean(comparison.start)
    worst = min(min(values), start) if comparison.larger_is_better else max(start, fmean(values[:1]))
    best = max(values) if comparison.larger_is_better else min(values)
    low, high = _factor(comparison) * min(worst, best), _factor(comparison) * max(worst, best)
    edge = 0.05 * (high - low) or 0.05 * max(abs(high), 1.0)  # all runs may have one score
    return (low - edge if comparison.larger_is_better else 0.95 * low), (high + edge)


def _rate_panel(axis: Axes, comparison: Comparison, row: Row) -> None:
    factor = _factor(comparison)
    budgets = sorted({trial.key.budget for trial in row.searched})
    for place, budget in enumerate(budgets):
        trials = sorted((t for t in row.searched if t.key.budget == budget), key=lambda t: t.key.rate)
        points = [(t.key.rate, factor * t.values["validation"]) for t in trials if not t.diverged]
        shade = 0.35 + 0.65 * (place + 1) / len(budgets)
        axis.plot(
            [x for x, _ in points], [y for _, y in points], ".-", color=FRONT, alpha=shade, linewidth=0.8 + 0.5 * place
        )
        chosen = [(x, y) for x, y in points if budget == budgets[-1] and x == row.found.rate]
        axis.plot([x for x, _ in chosen], [y for _, y in chosen], "o", color=FULL_LENGTH, mfc="none", ms=9, mew=1.6)
    edge = f" ({row.found.edge} tried)" if row.found.edge else ""
    axis.set_title(f"{row.name}{edge}", loc="left", fontsize=9.5)
    tidy(axis)


# -- costs -------------------------------------------------------------------------------------------


def _costs(comparison: Comparison) -> Figure:
    """Time of a step against the floor's, and peak memory."""
    rows = comparison.ranked[::-1]
    figure = blank_figure(9.0, 0.9 + 0.3 * max(1, len(rows)))
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(range(len(rows)), [row.costs.step_ratio for row in rows], color=FRONT)
    left.axvline(1.0, color=INK, linewidth=1.0, linestyle="--")
    left.set_xlabel("time of a step / frozen floor")
    right.barh(range(len(rows)), [row.costs.peak_bytes / 1e6 for row in rows], color=FRONT)
    right.set_xlabel("peak memory of a step, MB")
    left.set_yticks(range(len(rows)), [row.name for row in rows])
    for axis in (left, right):
        tidy(axis)
        axis.grid(axis="x", color="#E3E6EA", linewidth=0.8)
        axis.grid(visible=False, axis="y")
    return figure


PICTURES: Mapping[str, Callable[[Comparison], Figure]] = {
    "pareto": _pareto,
    "scores": _scores,
    "rates": _rates,
    "costs": _costs,
}
