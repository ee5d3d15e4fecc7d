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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._ui.pages import publish, render, require_packages
from ...errors import MissingExtraError
from ...model.parameter_report import readable_bytes
from ..running.progress import readable_seconds
from ..settings.config_file import settings_text
from ..settings.sections import LogSettings
from .plots import draw

if TYPE_CHECKING:
    from ..running.planning import RunPlan
    from ..running.session import Session
    from .before_after import Sample
    from .outcome import Result

__all__ = ["REPORT_NAME", "page", "require_for", "write_report"]

REPORT_NAME, PLOTS = "report.html", "plots"
PACKAGES = ("kilotune", "torch", "transformers", "accelerate", "bitsandbytes")


def require_for(logging: LogSettings) -> None:
    """Fail before a training, rather than after it, where a package is missing for what was asked of the logs.

    Raises:
        MissingExtraError: names the first one.

    """
    if logging.report:
        require_packages("train", "logging.report")
    if logging.progress == "bar":
        _need("rich.progress", "cli", "logging.progress bar")
    if logging.tensorboard:
        _need("torch.utils.tensorboard", "tensorboard", "logging.tensorboard")


def _need(module: str, extra: str, purpose: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError((error.name or module).partition(".")[0], extra, purpose) from error


def write_report(
    session: Session, result: Result, plan: RunPlan | None = None, samples: Sequence[Sample] = ()
) -> list[Path]:
    """Write report.html and plots/*.png into the output folder; returns their paths.

    Args:
        session: what was run.
        result: what it came to.
        plan: what was said before; None where nobody asked for one.
        samples: what base and fine-tune write.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        KilotuneError: the folder cannot be written to; then nothing was.

    """
    require_packages("train", "logging.report")
    pictures = draw(result.history, result.best_step)
    files = {f"{PLOTS}/{name}.png": picture for name, picture in pictures.items()}
    return publish(session.folder, {**files, REPORT_NAME: page(session, result, plan, pictures, samples).encode()})


def page(
    session: Session,
    result: Result,
    plan: RunPlan | None,
    pictures: Mapping[str, bytes],
    samples: Sequence[Sample] = (),
) -> str:
    """The whole page, as HTML text; ``pictures`` are PNG by name."""
    settings = session.settings
    names, scores = _scores(result)
    return render(
        __package__,
        "report.html",
        method=settings.adapter.method,
        base=Path(settings.model.base).name,
        task=settings.task,
        trained=f"{result.trained:,}",
        lasted=f"{result.steps:,} steps and {readable_seconds(result.seconds)}",
        made="adapter" if settings.adapter.is_adapter else "model",
        size=readable_bytes(result.adapter_bytes),
        kept=_kept(session, result),
        score_names=names,
        scores=scores,
        compared=result.compared,
        samples=samples,
        pictures=pictures,
        captions=_captions(session, result),
        costs=_costs(result, plan),
        splits=_splits(session),
        notes=session.notes,
        preview=session.prepared.preview,
        settings=settings_text(settings),
        versions=_versions(),
    )


def _captions(session: Session, result: Result) -> dict[str, tuple[str, str]]:
    """Of each picture: what it shows to who cannot see it, and what stands under it. Both say what this run has."""
    run, history, every = session.settings.training, result.history, session.settings.logging.log_every
    validated = {record["step"] for record in history if record["kind"] == "validation"}
    ring = " The ring: what was kept." if result.best_step in validated else ""
    also = ", and on validation" if validated else ""
    own = [name for name in ("head_learning_rate", "lora_plus_ratio") if getattr(run, name) is not None]
    others = f" What {' and '.join(own)} changes has a rate of its own." if own else ""
    clipped = (
        "not clipped" if run.max_grad_norm is None else f"before it is scaled down to {run.max_grad_norm:g} at most"
    )
    return {
        "loss": (
            "Loss over steps",
            f"The loss on the rows of train: of the first step, and then means over up to {every} steps{also}.{ring}",
        ),
        "metrics": ("Metrics over steps, a panel each", f"The metrics on validation.{ring}"),
        "learning_rate": ("Learning rate over steps", f"The learning rate ({run.schedule}).{others}"),
        "gradient": ("Norm of the gradients over steps", f"The norm of all gradients, {clipped}."),
    }


def _kept(session: Session, result: Result) -> dict[str, str] | None:
    """The score on validation of what was kept; None where nothing was validated."""
    scores = result.metrics.get("best") or result.metrics.get("last")
    if not scores:
        return None
    name = session.prepared.best_metric if session.prepared.best_metric in scores else next(iter(scores))
    return {"name": _words(name), "score": f"{scores[name]:.4g}", "step": f"{result.best_step:,}"}


def _scores(result: Result) -> tuple[list[str], list[list[str]]]:
    """Names of the scores, and a row for each split and step that was scored."""
    found = {name: values for name, values in result.metrics.items() if values}
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    said = {"best": f"validation, step {result.best_step:,} (kept)", "last": "validation, last", "test": "test"}
    rows = [
        [said.get(split, split), *(f"{values[name]:.4g}" if name in values else "" for name in names)]
        for split, values in sorted(found.items(), key=lambda item: list(said).index(item[0]))
    ]
    return [_words(name) for name in names], rows


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
            told["planned memory"] = f"{readable_bytes(plan.memory.peak)}: {plan.memory.line()}"
    return told


def _splits(session: Session) -> dict[str, str]:
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
    return told


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
