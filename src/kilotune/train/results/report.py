"""What a training came to, as one HTML page that needs nothing but itself, and its pictures as PNG beside it.

::

    require_for(settings.logging)               # before minutes of training: is everything there that was asked for?
    write_report(session, result, plan)         # report.html and plots/*.png in the output folder, all or nothing

The page has the result, the pictures, what it took beside what was planned, the data with an example, and the settings.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._ui.charts import require_matplotlib
from ..._ui.pages import document, facts, figure, publish, section, table
from ...errors import MissingExtraError
from ...model.parameter_report import readable_bytes
from ..running.progress import readable_seconds
from ..settings.config_file import settings_text
from ..settings.sections import LogSettings
from .plots import draw

if TYPE_CHECKING:
    from ..running.planning import RunPlan
    from ..running.session import Session
    from .outcome import Result

__all__ = ["REPORT_NAME", "page", "require_for", "write_report"]

REPORT_NAME, PLOTS = "report.html", "plots"
PACKAGES = ("kilotune", "torch", "transformers", "accelerate", "bitsandbytes")
CAPTIONS: Mapping[str, tuple[str, str]] = {
    "loss": ("Loss over steps", "The loss on what was trained on, and on validation. The ring: what was kept."),
    "metrics": ("Metrics over steps, a panel each", "The metrics on validation. The ring: what was kept."),
    "learning_rate": ("Learning rate over steps", "The learning rate of the first group of parameters."),
    "gradient": ("Norm of the gradients over steps", "The norm of all gradients, before they are clipped."),
}
"""Of each picture: what it shows to who cannot see it, and what stands under it."""


def require_for(logging: LogSettings) -> None:
    """Fail before a training, rather than after it, where a package is missing for what was asked of the logs.

    Raises:
        MissingExtraError: names the first one.

    """
    if logging.report:
        require_matplotlib("train", "logging.report")
    if logging.progress == "bar":
        _need("rich.progress", "cli", "logging.progress bar")
    if logging.tensorboard:
        _need("torch.utils.tensorboard", "tensorboard", "logging.tensorboard")


def _need(module: str, extra: str, purpose: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError((error.name or module).partition(".")[0], extra, purpose) from error


def write_report(session: Session, result: Result, plan: RunPlan | None = None) -> list[Path]:
    """Write report.html and plots/*.png into the output folder; returns their paths.

    Args:
        session: what was run.
        result: what it came to.
        plan: what was said before; None where nobody asked for one.

    Raises:
        MissingExtraError: matplotlib is not installed.
        KilotuneError: the folder cannot be written to; then nothing was.

    """
    require_matplotlib("train", "logging.report")
    pictures = draw(result.history, result.best_step)
    files = {f"{PLOTS}/{name}.png": picture for name, picture in pictures.items()}
    return publish(session.folder, {**files, REPORT_NAME: page(session, result, plan, pictures).encode()})


def page(session: Session, result: Result, plan: RunPlan | None, pictures: Mapping[str, bytes]) -> str:
    """The whole page, as HTML text; ``pictures`` are PNG by name."""
    settings = session.settings
    title = f"{settings.adapter.method} on {Path(settings.model.base).name}"
    drawn = "".join(figure(pictures[name], "png", *CAPTIONS[name]) for name in CAPTIONS if name in pictures)
    parts = [
        _head(session, result),
        section("Result", _scores(result)),
        section("How it went", drawn or "<p>Nothing was logged.</p>\n"),
        section("What it took", facts(_costs(result, plan))),
        section("Data", _data(session)),
        section("Settings", f"<pre>{escape(settings_text(settings))}</pre>\n"),
        section("Versions", facts(_versions())),
    ]
    return document(f"kilotune train: {title}", parts)


def _head(session: Session, result: Result) -> str:
    settings = session.settings
    kept = result.metrics.get("best") or result.metrics.get("last") or {}
    score = ""
    if kept:
        name = session.prepared.best_metric if session.prepared.best_metric in kept else next(iter(kept))
        score = f" On validation the {escape(_words(name))} is {kept[name]:.4g}, at step {result.best_step:,}."
    what = "adapter" if settings.adapter.is_adapter else "model"
    lasted = f"{result.steps:,} steps and {readable_seconds(result.seconds)}"
    size = f"the {what} takes {readable_bytes(result.adapter_bytes)}"
    return (
        f"<h1>{escape(settings.adapter.method)} on {escape(Path(settings.model.base).name)}</h1>\n"
        f'<p class="lead">{escape(settings.task)}: {result.trained:,} numbers were trained in {lasted}; {size}.{score}'
        "</p>\n"
    )


def _scores(result: Result) -> str:
    """A row for each split and step that was scored."""
    found = {name: values for name, values in result.metrics.items() if values}
    if not found:
        return "<p>Nothing was evaluated: there was neither a validation nor a test split.</p>\n"
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    said = {"best": f"validation, step {result.best_step:,} (kept)", "last": "validation, last", "test": "test"}
    rows = [
        [escape(said.get(split, split)), *(f"{values[name]:.4g}" if name in values else "" for name in names)]
        for split, values in sorted(found.items(), key=lambda item: list(said).index(item[0]))
    ]
    return table(["", *(escape(_words(name)) for name in names)], rows)


def _costs(result: Result, plan: RunPlan | None) -> dict[str, str]:
    told = {
        "time": f"{readable_seconds(result.seconds)}, evaluations included",
        "a step": f"{result.step_seconds:.3g} s, the median" if result.step_seconds else "not measured",
        "peak memory": f"{readable_bytes(result.peak_memory)} (of tensors on a GPU, of the whole process elsewhere)",
    }
    seen = [record for record in result.history if record["kind"] == "end"]
    for unit in ("tokens", "rows"):
        if seen and seen[-1].get(unit):
            told[unit] = f"{seen[-1][unit]:,} in the last session"
    if plan is not None:
        told["numbers"] = f"{plan.parameters.trainable:,} trained of {plan.parameters.total:,}"
        if plan.memory is not None:
            told["planned memory"] = f"{readable_bytes(plan.memory.peak)} of tensors: {plan.memory.line()}"
    return told


def _data(session: Session) -> str:
    prepared = session.prepared
    splits: Sequence[tuple[str, Any]] = [
        ("train", prepared.train),
        ("validation", prepared.validation),
        ("test", prepared.test),
    ]
    told = {name: f"{len(rows):,} rows" for name, rows in splits if rows is not None}
    if prepared.tokens:
        told["train"] += f", {prepared.tokens:,} tokens an epoch"
    if prepared.labels is not None:
        told["labels"] = ", ".join(prepared.labels)
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in session.notes)
    text = facts(told) + (f"<ul>\n{notes}</ul>\n" if notes else "")
    if prepared.preview:
        text += f"<p>One example, as the model sees it:</p>\n<pre>{escape(prepared.preview)}</pre>\n"
    return text


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _words(name: str) -> str:
    return name.replace("_", " ")
