"""The report of a comparison: tables as CSV, JSON and Markdown, pictures as SVG and PNG, and all of it as one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..._ui.pages import document, figure, publish, section, table
from .pictures import PICTURES, draw
from .results import LEGEND, Comparison

__all__ = ["page", "write_comparison"]

CAPTIONS: Mapping[str, tuple[str, str]] = {
    "pareto": (
        "Test score over bytes on disk, a point per method",
        "Test score over bytes on disk. Whiskers are the worst seed and the best. Blue: none is smaller and as good",
    ),
    "scores": ("Test scores, a dot per seed", "Every seed's test score, best mean at the top"),
    "rates": (
        "Validation score over learning rate, a panel per method",
        "The searches, all on the same axes and of the same budget; what is much worse than the start is cut off",
    ),
    "costs": (
        "Time of a step and peak memory, a bar per method",
        "One training step: time against forward and backward through the frozen base (dashed), and peak memory",
    ),
}
"""What each picture shows to who cannot see it, and what stands under it."""


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write everything into ``folder``, all or nothing of each file; report.html is the last.

    Raises:
        KilotuneError: the folder cannot be written to.
    """
    drawn = {name: draw(comparison, name) for name in PICTURES}
    files = {
        "comparison.json": (json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n").encode(),
        "comparison.csv": comparison.to_csv().encode(),
        "comparison.md": comparison.to_markdown().encode(),
        "runs.csv": comparison.runs_csv().encode(),
        **{f"{name}.{kind}": picture for name, both in drawn.items() for kind, picture in both.items()},
        "report.html": page(comparison, {name: both["svg"] for name, both in drawn.items()}).encode(),
    }
    return publish(folder, files)


def page(comparison: Comparison, drawn: Mapping[str, bytes]) -> str:
    """The whole page, as HTML text; ``drawn`` are the pictures as SVG."""
    heads, cells = comparison.table()
    lead = "".join(f"<p>{escape(note)}</p>\n" for note in comparison.notes)
    pictures = {name: figure(drawn[name], "svg+xml", *CAPTIONS[name]) for name in PICTURES}
    legend = escape(LEGEND.replace("\\", ""))
    return document(
        f"kilotune compare: {comparison.title}",
        [
            f"<h1>{escape(comparison.title)}</h1>\n{lead}",
            section(
                "Result",
                table([*map(escape, heads)], [[*map(escape, row)] for row in cells])
                + f'<p class="small">{legend}</p>\n{pictures["pareto"]}{pictures["scores"]}',
            ),
            section("Learning rates", pictures["rates"]),
            section("Costs", pictures["costs"]),
            section("What was compared", _contenders(comparison)),
            section("Settings", _facts({**comparison.settings, "search": comparison.search})),
        ],
    )


def _contenders(comparison: Comparison) -> str:
    rows = []
    for row in comparison.rows:
        options = ", ".join(f"{name}: {_plain(value)}" for name, value in row.contender.options.items())
        rows.append([escape(row.name), escape(row.contender.method), escape(options or "none")])
    return table(["", "method", "options"], rows, "text")


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>\n" for name, value in facts.items()
    )
    return f"<dl>\n{items}</dl>\n"


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
