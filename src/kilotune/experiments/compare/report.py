"""The report of a comparison: tables as CSV, JSON and Markdown, pictures as SVG and PNG, and all of it as one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..._ui.pages import publish, render
from .pictures import PICTURES, draw
from .problem import Contender
from .results import LEGEND, Comparison

__all__ = ["page", "write_comparison"]


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
    settings = {**comparison.settings, "search": comparison.search}
    return render(
        __package__,
        "report.html",
        title=comparison.title,
        notes=comparison.notes,
        heads=heads,
        cells=cells,
        legend=LEGEND.replace("\\", ""),
        pictures=drawn,
        contenders=[_contender(row.contender) for row in comparison.rows],
        settings={name.replace("_", " "): _plain(value) for name, value in settings.items()},
    )


def _contender(contender: Contender) -> list[str]:
    options = ", ".join(f"{name}: {_plain(value)}" for name, value in contender.options.items())
    return [contender.name, contender.method, options or "none"]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
