"""The demo's pictures, as SVG bytes; how charts look is in ``kilotune._ui.charts``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ..._ui.charts import COLOURS, INK, STYLE, blank_figure, svg, tidy
from ..._ui.sizes import readable_bytes
from .measuring import BASE
from .results import PeopleResult
from .training import SHARED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PICTURES", "draw"]

PEOPLE = (*COLOURS, "#6B7280", "#8C564B")
GREY, WIDE = "#B5BBC4", "#DDE1E6"
OWN, COMMON = COLOURS[0], COLOURS[4]
FULL_COLOUR = 0.75  # of the largest gain or loss on the map, the bases' aside


def draw(result: PeopleResult) -> dict[str, bytes]:
    """All of :data:`PICTURES`; equal results give equal bytes."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        return {name: svg(make(result)) for name, make in PICTURES.items()}


def losses(result: PeopleResult) -> Figure:
    """For each one's text: the base, the shared adapter, everybody else's, one's own."""
    figure = blank_figure(11.0, 0.5 * len(result.people) + 1.5)
    axis = figure.subplots()
    for place, person in enumerate(result.people):
        own, others = result.own(person.name), result.others(person.name)
        shared, base = result.losses[SHARED][person.name], result.losses[BASE][person.name]
        label = place == 0
        axis.plot([own, base], [place, place], color=WIDE, linewidth=1.2, zorder=1)
        axis.plot(base, place, "o", color=GREY, markersize=8, label="the base alone" if label else None, zorder=3)
        axis.plot(
            others, [place] * len(others), "|", color=COLOURS[1], markersize=11, markeredgewidth=1.6,
            label="somebody else's adapter" if label else None, zorder=2,
        )  # fmt: skip
        axis.plot(
            shared, place, "D", color=COMMON, markersize=8, label="the shared adapter" if label else None, zorder=4
        )
        axis.plot(
            own, place, "o", color=OWN, markersize=10, label="one's own on top of it" if label else None, zorder=5
        )
    axis.set_yticks(range(len(result.people)), [person.title for person in result.people])
    axis.invert_yaxis()
    axis.set_xlabel("held-out loss, nats a token (less is better)")
    tidy(axis)
    axis.grid(axis="x", color="#E3E6EA", linewidth=0.8, zorder=0)
    axis.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    return figure


def heat(result: PeopleResult) -> Figure:
    """Everybody's text under everybody's adapter: colour is the difference to the shared one, numbers are losses."""
    columns = [BASE, SHARED, *result.names]
    values = np.array([[result.losses[column][name] for column in columns] for name in result.names])
    change = values - values[:, [1]]
    reach = FULL_COLOUR * max(float(np.abs(change[:, 1:]).max()), 1e-9)
    figure = blank_figure(11.0, 0.62 * len(result.names) + 1.9)
    axis = figure.subplots()
    image = axis.imshow(change, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto")
    for row, losses_ in enumerate(values):
        for column, loss in enumerate(losses_):
            dark = abs(change[row, column]) > 0.6 * reach
            weight = "bold" if loss == losses_.min() else "normal"
            axis.text(
                column, row, f"{loss:.2f}", ha="center", va="center", fontsize=10, fontweight=weight,
                color="white" if dark else INK,
            )  # fmt: skip
    titles = [person.title for person in result.people]
    axis.set_xticks(
        range(len(columns)), ["the base", "shared", *titles], rotation=30, ha="left", rotation_mode="anchor"
    )
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(titles)), titles)
    axis.set_ylabel("whose text")
    axis.set_xlabel("whose adapter")
    axis.axvline(1.5, color="white", linewidth=4)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02, extend="both")
    bar.set_label("against the shared adapter, nats a token")
    bar.outline.set_visible(False)
    return figure


def curves(result: PeopleResult) -> Figure:
    """The two trainings: the shared adapter step by step, and everybody's validation rows on the way."""
    figure = blank_figure(11.0, 4.0)
    left, right = figure.subplots(1, 2)
    steps = [step for step, _ in result.shared.curve]
    left.plot(
        steps, [loss[SHARED] for _, loss in result.shared.curve], color=GREY, linewidth=1.2, label="a step's rows"
    )
    shared = result.shared.of(SHARED)
    told = [(0, shared.without), *shared.validation] if shared.without is not None else [*shared.validation]
    left.plot(*zip(*told), "o-", color=COMMON, label="validation rows")
    left.set_title("The shared adapter, on everybody's rows", loc="left", fontweight="bold", fontsize=10.5)
    left.legend(frameon=False)
    for person, colour in zip(result.people, PEOPLE):
        own = result.personal.of(person.name)
        told = [(0, own.without), *own.validation] if own.without is not None else [*own.validation]
        right.plot(*zip(*told), color=colour, linewidth=1.5, label=person.title)
        kept = [(step, loss) for step, loss in own.validation if step == own.best_step and person.bytes]
        if kept:
            right.plot(*kept[0], "o", color=colour, markersize=6)
    right.set_title(
        "Each one's own on top of it, on one's validation rows", loc="left", fontweight="bold", fontsize=10.5
    )
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.set_ylabel("loss, nats a token")
        tidy(axis)
    return figure


def sizes(result: PeopleResult) -> Figure:
    """What one person more takes: a personal adapter, a LoRA of one's own, a copy of the model."""
    settings = result.settings
    bars = [
        (f"a personal adapter\n({settings.personal.title})", result.personal_bytes, OWN),
        (f"a {settings.shared.title}\non the same layers", result.shared_bytes, COMMON),
        ("a copy of the model", int(result.base["bytes"]), GREY),
    ]
    figure = blank_figure(11.0, 2.6)
    axis = figure.subplots()
    for place, (_, size, colour) in enumerate(bars):
        axis.barh(place, size, color=colour, height=0.62, zorder=2)
        axis.text(size * 1.15, place, readable_bytes(size), va="center", fontsize=10)
    axis.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(min(size for _, size, _ in bars) / 8, max(size for _, size, _ in bars) * 9)
    axis.set_xlabel("bytes for one person more (each line is ten times the one before)")
    tidy(axis)
    axis.grid(axis="x", color="#E3E6EA", linewidth=0.8, zorder=0)
    return figure


PICTURES: Mapping[str, Callable[[PeopleResult], Figure]] = MappingProxyType(
    {"losses": losses, "heat": heat, "curves": curves, "sizes": sizes}
)
