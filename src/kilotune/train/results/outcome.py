"""What a fine-tuning came to: the best adapter taken, the test split scored, the files written."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors.torch import save_file

from ...errors import CheckpointError
from ..running.base_model import device_of
from ..running.history import History
from ..running.process_memory import peak_bytes
from ..running.session import Session
from ..trainer import output_folder
from ..trainer.failures import told_of_disk
from ..trainer.from_settings import generating
from ..trainer.output_folder import CHECKPOINTS, RESULT_NAME
from .before_after import Compared

__all__ = ["LABELS_NAME", "Result", "finish", "form_of", "is_main", "save", "take_best"]

LABELS_NAME = "labels.json"


def is_main() -> bool:
    """Whether this is the process that writes files, of several that torchrun or accelerate started."""
    return int(os.environ.get("RANK", "0")) == 0


@final
@dataclass(frozen=True)
class Result:
    """What a fine-tuning came to.

    Attributes:
        folder: where everything is.
        steps: of the optimizer, those of earlier sessions included.
        seconds: of training and evaluations, of all sessions.
        metrics: ``best`` and ``last`` on validation, ``test``; each absent where there is no such split.
        best_step: the step whose adapter this is; the last one where nothing was evaluated.
        trained: numbers that were trained.
        adapter_bytes: of the adapter's weights on disk; of the whole model's for the methods ``full`` and ``head``.
        peak_memory: bytes, the most while it trained; on CUDA of tensors, elsewhere of the process.
        step_seconds: the median over the steps of this session; 0 where there were none.
        learning_rate: the highest one. rate_from: where that is from, in a sentence.
        form: what the rows of a model that writes were made into: messages (in the chat template), prompt, text or
            source; else None.
        compared: with the base, on held-out rows; None where that was not asked for, or where there is no base.
        history: one dict a record, as in logs/history.jsonl.
    """

    folder: Path
    steps: int
    seconds: float
    metrics: Mapping[str, Mapping[str, float]]
    best_step: int
    trained: int
    adapter_bytes: int
    peak_memory: int
    step_seconds: float
    learning_rate: float = 0.0
    rate_from: str = ""
    form: str | None = None
    compared: Compared | None = None
    history: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types, without the history, which has its own file."""
        values = {name: getattr(self, name) for name in (f.name for f in dataclasses.fields(self)) if name != "history"}
        compared = None if self.compared is None else self.compared.to_dict()
        metrics = {name: dict(scores) for name, scores in self.metrics.items()}
        return {**values, "folder": str(self.folder), "metrics": metrics, "compared": compared}


def form_of(folder: Path) -> str | None:
    """What the rows were that the model in ``folder`` learned from; None where no training is there that says it."""
    try:
        found = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the adapter may be from anywhere
        return None
    form = found.get("form") if isinstance(found, dict) else None
    return form if isinstance(form, str) else None


def take_best(session: Session, trainer: Any) -> int:
    """Put the best evaluation's weights into the model, if that is wanted, and score the test split.

    Returns:
        The step that the model is of.

    """
    best_step = _load_best(session, trainer)
    rows = session.prepared.test
    if rows is not None:
        generates = session.task is not None and session.task.generates
        with generating(trainer, rows) if generates else contextlib.nullcontext():
            trainer.evaluate(rows, metric_key_prefix="test")
    return best_step


def finish(
    session: Session,
    state: Any,
    best_step: int,
    history: History,
    steps: Sequence[float],
    compared: Compared | None = None,
) -> Result:
    """Write the result.

    Args:
        session: whose model is the result.
        state: the Trainer's, at the end.
        best_step: from :func:`take_best`.
        history: of all sessions.
        steps: seconds of each step of this session.
        compared: with the base.

    Raises:
        ResourceError: it cannot be written.

    """
    folder = session.folder
    result = Result(
        folder=folder,
        steps=state.global_step,
        seconds=max((float(record["seconds"]) for record in history.records), default=0.0),
        metrics=_metrics(history.records, best_step),
        best_step=best_step,
        trained=sum(p.numel() for p in session.model.parameters() if p.requires_grad),
        adapter_bytes=0,
        peak_memory=peak_bytes(device_of(session.settings.training.device)),
        step_seconds=statistics.median(steps) if steps else 0.0,
        learning_rate=0.0 if session.rate is None else session.rate.value,
        rate_from="" if session.rate is None else session.rate.why,
        form=session.prepared.form,
        compared=compared,
        history=tuple(history.records),
    )
    if not is_main():
        return result
    with told_of_disk(folder / RESULT_NAME, "the result", folder / CHECKPOINTS):
        save(session, folder)
        weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
        result = dataclasses.replace(result, adapter_bytes=sum(path.stat().st_size for path in weights))
        output_folder.write_json(folder / RESULT_NAME, result.to_dict())
    return result


def _load_best(session: Session, trainer: Any) -> int:
    """Put the best evaluation's weights into the model, if that is wanted; returns the step that the model is of."""
    run, state = session.settings.training, trainer.state
    wanted = session.prepared.validation is not None if run.load_best is None else run.load_best
    best = state.best_global_step
    if not wanted or not best or best == state.global_step:
        return int(state.global_step)
    folder = session.folder / CHECKPOINTS / f"checkpoint-{best}"
    if (damage := output_folder.damage_of(folder)) is not None:
        why = "is gone" if not folder.is_dir() else f"is damaged: {damage}"
        raise CheckpointError(f"the best evaluation was at step {best}, and its checkpoint {folder} {why}")
    state.best_model_checkpoint = str(folder)
    trainer._load_best_model()
    return int(best)


def _metrics(records: Sequence[Mapping[str, Any]], best_step: int) -> dict[str, dict[str, float]]:
    """The numbers of the last evaluation, of the one at ``best_step``, and of the test split."""
    validation = [record for record in records if record["kind"] == "validation"]
    found = {
        "last": validation[-1:],
        "best": [record for record in validation if record["step"] == best_step][-1:],
        "test": [record for record in records if record["kind"] == "test"][-1:],
    }
    own = ("kind", "step", "epoch", "seconds", "tokens", "rows", "memory")
    return {name: {k: v for k, v in last[0].items() if k not in own} for name, last in found.items() if last}


def save(session: Session, folder: Path) -> None:
    """Write what the session trained: the adapter, or the whole model; beside it the tokenizer and the classes' names.

    Raises:
        CheckpointError, OSError: it cannot be written.

    """
    model = session.model
    if callable(write := getattr(model, "save_pretrained", None)):
        write(folder)
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
    if session.processor is not None:
        session.processor.save_pretrained(folder)
    if session.prepared.labels is not None:
        output_folder.write_json(folder / LABELS_NAME, {"labels": list(session.prepared.labels)})
