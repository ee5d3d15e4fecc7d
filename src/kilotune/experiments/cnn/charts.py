"""The report's pictures, as SVG or PNG bytes; how charts look is in ``kilotune._ui.charts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ..._ui.charts import INK, STYLE, blank_figure, png, svg, tidy
from .results import CnnResult, Curve
from .settings import LABELS, METHODS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLOURS", "accuracy_chart", "loss_chart", "sample_strip"]

COLOURS: Mapping[str, str] = MappingProxyType({"vera": "#0072B2", "lora": "#D55E00", "full": "#009E73"})
"""Told apart by colour-blind readers too (Okabe and Ito's palette)."""
BEFORE_COLOUR = "#B5BBC4"
ADAPTED_COLOUR = "#FFF3D6"
FRAME_COLOUR = "#E69F00"


def accuracy_chart(result: CnnResult) -> bytes:
    """Per-class accuracy before and after, a panel per method; bars are means, whiskers ranges (SVG)."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = blank_figure(11.0, 7.4)
        axes = figure.subplots(len(METHODS), 1, sharex=True, sharey=True)
        for axis, method in zip(axes, METHODS, strict=True):
            _accuracy_panel(axis, result, method)
        adapted = result.settings.classes
        names = [f"{n}\nadapted" if c in adapted else n for c, n in enumerate(result.class_names)]
        axes[-1].set_xticks(range(10), names)
        axes[-1].set_xlabel("class")
        return svg(figure)


def _accuracy_panel(axis: Axes, result: CnnResult, method: str) -> None:
    before = 100 * np.array([seed.before for seed in result.seeds])
    after = 100 * np.array([seed.runs[method].after for seed in result.seeds])
    for label in result.settings.classes:
        axis.axvspan(label - 0.5, label + 0.5, color=ADAPTED_COLOUR, zorder=0)
    bars = ((before, -0.2, BEFORE_COLOUR, "before"), (after, 0.2, COLOURS[method], f"after {LABELS[method]}"))
    for values, shift, colour, text in bars:
        where, mean = np.arange(10) + shift, values.mean(axis=0)
        axis.bar(where, mean, 0.38, color=colour, label=text, zorder=2)
        if len(values) > 1:
            reach = np.abs(np.stack([values.min(axis=0), values.max(axis=0)]) - mean)
            axis.errorbar(where, mean, reach, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2, zorder=3)
    axis.set_ylabel("accuracy, %")
    axis.set_xlim(-0.5, 9.5)
    axis.set_ylim(0, 105)
    axis.set_title(LABELS[method], loc="left", fontweight="bold", fontsize=10.5)
    tidy(axis)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, borderaxespad=0.2)


def loss_chart(result: CnnResult) -> bytes:
    """Training loss of the pretraining and of each adaptation: mean over the seeds, and their range (SVG)."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = blank_figure(11.0, 3.6)
        left, right = figure.subplots(1, 2)
        _curves(left, [seed.losses for seed in result.seeds], INK, "pretraining")
        left.set_title("Pretraining on ten classes", loc="left", fontweight="bold", fontsize=10.5)
        for method in METHODS:
            curves = [seed.runs[method].losses for seed in result.seeds]
            _curves(right, curves, COLOURS[method], LABELS[method])
        count = len(result.settings.classes)
        right.set_title(f"Adapting to {count} classes", loc="left", fontweight="bold", fontsize=10.5)
        right.legend(frameon=False)
        for axis in (left, right):
            axis.set_xlabel("optimizer step")
            axis.set_ylabel("cross-entropy (log scale)")
            axis.set_yscale("log")
            tidy(axis)
        return svg(figure)


def _curves(axis: Axes, curves: Sequence[Curve], colour: str, label: str) -> None:
    steps = [step for step, _ in curves[0]]
    # A loss of exactly 0 has no logarithm; below 1e-6 nothing is left to see.
    values = np.maximum(np.array([[loss for _, loss in curve] for curve in curves]), 1e-6)
    axis.plot(steps, values.mean(axis=0), color=colour, label=label, linewidth=1.6)
    if len(curves) > 1:
        lowest, highest = values.min(axis=0), values.max(axis=0)
        axis.fill_between(steps, lowest, highest, color=colour, alpha=0.15, linewidth=0)


def sample_strip(result: CnnResult) -> bytes:
    """A test picture of each class, as pretrained on, and below as the copies saw it (PNG)."""
    import matplotlib as mpl

    rows = list(result.samples) if result.settings.rotation % 360 else [result.samples[0]]
    titles = ["pretraining", "adapting"]
    with mpl.rc_context(STYLE):
        figure = blank_figure(11.0, 1.35 * len(rows) + 0.2)
        grid = figure.subplots(len(rows), 10, squeeze=False)
        for line, (axes, pictures) in enumerate(zip(grid, rows, strict=True)):
            for label, axis in enumerate(axes):
                colour, width = ("#C9CED6", 0.8)
                if label in result.settings.classes:
                    colour, width = (FRAME_COLOUR, 2.5)
                axis.imshow(pictures[label].permute(1, 2, 0).numpy(), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                for spine in axis.spines.values():
                    spine.set(color=colour, linewidth=width)
                if line == 0:
                    axis.set_title(result.class_names[label], fontsize=9.5)
            axes[0].set_ylabel(titles[line])
        return png(figure)
