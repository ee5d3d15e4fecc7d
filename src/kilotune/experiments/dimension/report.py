"""The report on an intrinsic dimension: a chart of score over d, an HTML page, a table of all runs as CSV, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..._ui.charts import INK, STYLE, blank_figure, svg, tidy
from ..._ui.pages import document, figure, publish, section, table
from .results import DimensionResult, Level, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["score_chart", "score_page", "write_dimension_report"]

COLOURS: Mapping[str, str] = MappingProxyType({"did": "#0072B2", "said": "#D55E00"})
FULL_COLOUR = "#009E73"


def write_dimension_report(result: DimensionResult, folder: Path) -> list[Path]:
    """Write scores.svg, scores.csv, results.json and report.html into ``folder``, all or nothing of each.

    Raises:
        KilotuneError: the folder cannot be written to.
    """
    chart = score_chart(result)
    files = {
        "scores.svg": chart,
        "scores.csv": result.to_csv().encode(),
        "results.json": (json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
        "report.html": score_page(result, chart).encode(),
    }
    return publish(folder, files)


def score_chart(result: DimensionResult) -> bytes:
    """Score over d: lines are medians, shades reach from the worst seed to the best, dots are the seeds (SVG)."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        fig = blank_figure(9.0, 4.6)
        axis = fig.subplots()
        factor = 100 if result.percent else 1
        axis.axhline(factor * result.full.median, color=FULL_COLOUR, linewidth=1.4, label="full training, median")
        share = f"{100 * result.share:g} % of it"
        axis.axhline(factor * result.threshold, color=FULL_COLOUR, linewidth=1.2, linestyle="--", label=share)
        axis.axhline(factor * result.start_median, color="#8A919C", linewidth=1.0, linestyle=":", label="untrained")
        for outcome in result.outcomes:
            if outcome.levels:
                _draw(axis, outcome, factor, result.symbol)
        axis.set_xscale("log")
        axis.set_xlabel("d, numbers trained (log scale)")
        axis.set_ylabel(f"validation {result.metric}{', %' if result.percent else ''}")
        axis.set_title(result.task, loc="left", fontweight="bold", fontsize=10.5)
        tidy(axis)
        axis.legend(frameon=False, loc="lower right")
        return svg(fig)


def _draw(axis: Axes, outcome: Outcome, factor: int, symbol: str) -> None:
    colour = COLOURS[outcome.structure]
    levels = [level for level in outcome.levels if all(run.validation is not None for run in level.runs)]
    found = f"{outcome.structure.upper()}, {symbol} = {outcome.d90:,}" if outcome.d90 else outcome.structure.upper()
    where = [level.d for level in levels]
    axis.plot(where, [factor * level.median for level in levels], color=colour, linewidth=1.6, label=found)
    worst, best = ([factor * level.range[end] for level in levels] for end in (0, 1))
    axis.fill_between(where, worst, best, color=colour, alpha=0.15, linewidth=0)
    for level in outcome.levels:
        values = [factor * run.validation for run in level.runs if run.validation is not None]
        axis.plot([level.d] * len(values), values, ".", color=colour, markersize=4, alpha=0.7)
    if outcome.d90:
        axis.axvline(outcome.d90, color=colour, linewidth=0.9, linestyle="--")
        axis.plot([outcome.d90], [factor * outcome.threshold], "o", color=colour, markeredgecolor=INK, markersize=6)


def score_page(result: DimensionResult, chart: bytes) -> str:
    """The whole page, as HTML text."""
    caption = (
        "Score on the validation data over d. Lines are medians over the seeds, shades reach from the worst to the"
        " best, dots are the seeds. The answer is the smallest d tried that reaches the dashed line together with"
        " every larger d tried."
    )
    alt = f"Validation {result.metric} over the number of trained dimensions, with the threshold"
    return document(
        f"kilotune intrinsic-dimension: {result.task}",
        [
            _head(result),
            section("Score over d", figure(chart, "svg+xml", alt, caption)),
            section("Every d tried", "".join(_levels(result, outcome) for outcome in result.outcomes)),
            section("How it was measured", _how(result)),
            section("Settings", _settings(result)),
        ],
    )


def _head(result: DimensionResult) -> str:
    answers = "".join(f"<li>{escape(answer)}</li>\n" for answer in result.answers)
    notes = "".join(f'<p class="small">{escape(note)}</p>\n' for note in result.notes)
    return (
        f"<h1>Intrinsic dimension: {escape(result.task)}</h1>\n"
        f'<p class="lead">How many numbers must be trained to reach {100 * result.share:g} % of what training all'
        f" {result.trained_in_full:,} reaches? Full training scores {result.shown(result.full.median)} (median), so"
        f" {result.shown(result.threshold)} is wanted; before any training it is"
        f' {result.shown(result.start_median)}.</p>\n<ul class="lead">\n{answers}</ul>\n{notes}'
    )


def _levels(result: DimensionResult, outcome: Outcome) -> str:
    name = outcome.structure.upper()
    if not outcome.levels:
        return f"<p>{name}: nothing was tried, as the untrained model reaches the threshold.</p>\n"
    unit = ", %" if result.percent else ""
    head = [name, "learning<br>rate", f"validation{unit},<br>median", "worst", "best", f"test{unit},<br>median", ""]
    rows = [_row(result, level, _verdict(outcome, level)) for level in outcome.levels]
    rows.append(_row(result, result.full, "full training"))
    return table(head, rows)


def _verdict(outcome: Outcome, level: Level) -> str:
    if level.d == outcome.d90:
        return "<b>the answer</b>"
    return "reaches it" if level.median >= outcome.threshold else ""


def _row(result: DimensionResult, level: Level, verdict: str) -> list[str]:
    worst, best = level.range
    scores = (level.median, worst, best, level.test_median)
    rate = f"{level.rate:g}{' (at the end)' if level.at_edge else ''}"
    d = f"d = {level.d:,}" if level.d else "all"
    return [d, rate, *map(result.shown, scores), verdict]


def _how(result: DimensionResult) -> str:
    notes = (
        (
            f"The subspace is in the {result.weights:,} weights of {result.layers} layers: W + P theta, with P fixed"
            " and random, and theta, of d numbers, trained from zero. DID adds the projected vector as it is; SAID"
            " scales it by one learned number per layer, and these are among the d."
        ),
        (
            "Biases, and whatever else the model has, stay as they start. Li et al. put them into the subspace, too."
            f" Full training trains all {result.trained_in_full:,} numbers, biases among them."
        ),
        (
            "At each d, and for full training, the learning rate is the best of several on the validation data, tried"
            " with a seed that is not reported. The score that is compared with the threshold is on the same"
            " validation data; the test data decide nothing."
        ),
        (
            "That a larger d is better is not assumed. The seeds draw the weights, the projection and the order of"
            " the data; the learning rate and the threshold are common to them."
        ),
    )
    return "<ul>\n" + "".join(f"<li>{note}</li>\n" for note in notes) + "</ul>\n"


def _settings(result: DimensionResult) -> str:
    facts: dict[str, Any] = {**result.settings, **result.settings["search"]}
    del facts["search"]
    items = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>\n" for name, value in facts.items()
    )
    return f"<dl>\n{items}</dl>\n"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount} {name}" for name, amount in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
