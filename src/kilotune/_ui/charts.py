"""How the charts of all reports look, drawn by matplotlib without its global state, as SVG or PNG bytes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "STYLE", "blank_figure", "png", "svg", "tidy"]

INK = "#2B2F36"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart by colour-blind readers too (Okabe and Ito's palette)."""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "kilotune",  # the same run draws the same bytes
    "svg.fonttype": "path",
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8A919C",
    "xtick.color": INK,
    "ytick.color": INK,
}


def blank_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axis: Axes) -> None:
    """No frame on two sides, and light lines across."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E3E6EA", linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)


def svg(figure: Figure) -> bytes:
    """The figure as SVG; equal figures give equal bytes."""
    return _save(figure, "svg")


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    return _save(figure, "png")


def _save(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    quiet: dict[str, Any] = {"Date": None} if kind == "svg" else {}  # a date would make equal runs differ
    figure.savefig(out, format=kind, dpi=110, metadata=quiet)
    return out.getvalue()
