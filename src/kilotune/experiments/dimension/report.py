"""The report on an intrinsic dimension: a chart of score over d, an HTML page, a table of all runs as CSV, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..._ui.charts import INK, STYLE, blank_figure, svg, tidy
from ..._ui.pages import publish, render
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
    settings = {**result.settings, **result.settings["search"]}
    del settings["search"]
    return render(
        __package__,
        "report.html",
        task=result.task,
        metric=result.metric,
        percent=result.percent,
        share=f"{100 * result.share:g}",
        scores={
            "full": result.shown(result.full.median),
            "wanted": result.shown(result.threshold),
            "start": result.shown(result.start_median),
        },
        answers=result.answers,
        notes=result.notes,
        chart=chart,
        outcomes=[
            {
                "name": outcome.structure.upper(),
                "rows": [_row(result, level, outcome) for level in outcome.levels],
            }
            for outcome in result.outcomes
        ],
        full=_row(result, result.full),
        layers=result.layers,
        weights=f"{result.weights:,}",
        trained_in_full=f"{result.trained_in_full:,}",
        settings={name.replace("_", " "): _plain(value) for name, value in settings.items()},
    )


def _row(result: DimensionResult, level: Level, outcome: Outcome | None = None) -> dict[str, Any]:
    """A row of the table of an outcome; without one that of full training."""
    worst, best = level.range
    scores = (level.median, worst, best, level.test_median)
    rate = f"{level.rate:g}{' (at the end)' if level.at_edge else ''}"
    note = "full training"
    if outcome is not None:
        note = "reaches it" if level.median >= outcome.threshold else ""
    return {
        "cells": [f"d = {level.d:,}" if level.d else "all", rate, *map(result.shown, scores)],
        "answer": outcome is not None and level.d == outcome.d90,
        "note": note,
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{amount} {name}" for name, amount in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
