"""A trained adapter (or a whole model) with data to score it on, from the folder that a training leaves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...adapter_files.files import CONFIG_NAME
from ...adapter_files.own_files import TEMPLATE
from ...errors import CheckpointError, ConfigError, did_you_mean, gather
from ...model.peft_model import PeftModel
from ..data.processors import template_note, with_template
from ..finished.text_generation import TOKENIZER_FILES
from ..running import base_model as models
from ..running.held_dtype import held_dtype
from ..running.session import Session
from ..settings.config_file import merged, read_config, settings_from
from ..settings.sections import TASK_NAMES, ModelSettings, TrainSettings
from ..tasks import TASKS, Task
from ..trainer import output_folder
from ..trainer.failures import advise_on_memory
from ..trainer.output_folder import SETTINGS_NAME
from .outcome import LABELS_NAME, form_of

__all__ = ["check_base", "open_scoring", "scoring_settings"]

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES)
# What of a training's settings also says how rows are read and scored; the rest is about its own data and its steps.
KEPT = {
    "data": ("columns", "max_length", "loss_on", "plain"),
    "training": ("batch_size", "seed", "precision", "device"),
}
AS_THEY_STAND = ("prompt", "text")  # forms of a training: what it learned was in no chat template
# What else may be changed. The columns are named one by one: data.columns.text.
USED = (
    *(f"{part}.{name}" for part, names in KEPT.items() for name in names),
    *(f"data.{name}" for name in ("format", "subset", "splits")),
    *(f"training.{name}" for name in ("eval_batch_size", "workers")),
    *(f"model.{name}" for name in ("dtype", "quantization", "attention")),
)


def scoring_settings(
    folder: Path,
    data: Sequence[str],
    base: str,
    *,
    revision: str | None = None,
    task: str | None = None,
    changes: Sequence[str] = (),
) -> TrainSettings:
    """The settings of a training in ``folder``, with ``data`` to be scored in place of its own.

    Args:
        folder: of the adapter, or of the whole model.
        data: files, or a folder of images, or ``hub:NAME``.
        base: the base's folder or hub id.
        revision: of a hub id.
        task: its name, where no training is in the folder.
        changes: ``a.b=c``, as ``--set`` takes them.

    Raises:
        ConfigError: the task is not known, or settings are wrong; all faults at once.

    """
    file = folder / SETTINGS_NAME
    trained = read_config(file) if file.is_file() else {}
    known = trained.get("task", None if not trained else TrainSettings.defaults()["task"])
    if task is not None and known is not None and task != known:
        raise ConfigError(f"--task {task}: what is in {folder} was trained for {known}")
    if (name := task or known) is None:
        raise ConfigError(f"{folder} holds no {SETTINGS_NAME}; say what is to be scored: --task {'|'.join(TASK_NAMES)}")
    if name not in TASK_NAMES:
        raise ConfigError(
            f"task: expected one of {list(TASK_NAMES)}, got {name!r}.{did_you_mean(str(name), TASK_NAMES)}"
        )
    values: dict[str, Any] = {"task": name, **{part: _kept(trained, part) for part in KEPT}}
    values["model"] = {**_section(trained, "model"), "base": base, "revision": revision}
    values["adapter"] = {"method": _section(trained, "adapter").get("method", "lora")}
    values["data"]["test"] = list(data)
    if form_of(folder) in AS_THEY_STAND:
        values["data"]["plain"] = True
    found = settings_from(merged(values, changes), str(file) if trained else "the settings")
    changed = [change.partition("=")[0].strip() for change in changes]
    if idle := [name for name in changed if name not in USED and name.rpartition(".")[0] not in USED]:
        faults = [f"{name}: has no effect on a score" for name in idle]
        raise ConfigError(gather("--set:", [*faults, f"what has: {', '.join(USED)}"]))
    return found


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _kept(values: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {name: value for name, value in _section(values, part).items() if name in KEPT[part]}


def open_scoring(settings: TrainSettings, folder: Path, labels: Sequence[str] | None = None) -> Session:
    """Read the data, load the base, and put the adapter in.

    Args:
        settings: from :func:`scoring_settings`.
        folder: the adapter's; or that of a whole model, which is the base then.
        labels: the classes in the order of their numbers; None: those that the training wrote down.

    Returns:
        For ``evaluate(session, "test")``; a model without an adapter where there is none.

    Raises:
        ConfigError: the data does not fit the task, or the base cannot be had.
        CheckpointError: the adapter is of another base.

    """
    device = models.device_of(settings.training.device)
    task = TASKS[settings.task]()
    called = "--base" if (folder / CONFIG_NAME).is_file() else "ADAPTER"
    config = models.load_config(settings.model, called)
    own = any((folder / name).is_file() for name in PROCESSOR_FILES)
    processor = (
        task.load_processor(str(folder)) if own else task.load_processor(settings.model.base, settings.model.revision)
    )
    if not own and (folder / TEMPLATE).is_file():
        processor = with_template(processor, folder)
    known = _labels(folder) if labels is None else tuple(labels)
    limits = dataclasses.replace(models.limits_of(config), labels=known)
    prepared = task.prepare(settings.data, processor, limits, settings.training.seed)
    if prepared.labels is None and labels is not None:
        raise ConfigError(f"--labels: {settings.task} has no classes")
    if prepared.labels is not None and known is None:
        raise ConfigError(
            f"{folder} holds no {LABELS_NAME}, so it is not known which class has which number; give the classes in "
            "the order of their numbers: --labels a,b,c"
        )
    with advise_on_memory(settings, "while the base model was loaded"):
        loaded = models.load_base(settings.model, task, prepared, device, called)
    models.set_padding(loaded.model, processor)
    adapted = (folder / CONFIG_NAME).is_file()
    if adapted:
        check_base(loaded.model, settings.model, folder, loaded.fresh)
    held = held_dtype(loaded.model, settings.model.dtype, device, backward=False)
    held.apply(loaded.model)
    model = _adapted(loaded, settings, task, folder) if adapted else loaded.model
    said = template_note(processor, folder, settings.model.base, settings.model.revision) if adapted else None
    notes = (*prepared.notes, *(note for note in (held.note, said) if note))
    return Session(settings, model, processor, prepared, task, notes=notes)


def _labels(folder: Path) -> tuple[str, ...] | None:
    """The classes that a training wrote down beside its adapter."""
    path = folder / LABELS_NAME
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["labels"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: expected {{'labels': [...]}}") from error
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"{path} is damaged: expected a list of names, got {names!r}")
    return tuple(names)


def check_base(model: Any, settings: ModelSettings, folder: Path, fresh: Sequence[str] = ()) -> None:
    """Refuse a base whose weights are not those of the one that the training in ``folder`` had, where that is known.

    Quantised weights differ from machine to machine, so they are not looked at.

    Raises:
        CheckpointError: they are others.

    """
    before = None if settings.quantization != "none" else output_folder.base_of_run(folder, settings.to_dict())
    if before is not None and before != output_folder.base_digest(model, fresh):
        raise CheckpointError(
            f"the adapter in {folder} was trained on another base than {settings.base!r}: the weights are others"
        )


def _adapted(loaded: models.Loaded, settings: TrainSettings, task: Task, folder: Path) -> PeftModel:
    models.hold_in_float32(loaded.model, models.heads_of(loaded, task))
    model = PeftModel.from_pretrained(loaded.model, folder)
    saved = model.installed("default").saved
    if bare := [name for name in loaded.fresh if name not in saved]:
        raise CheckpointError(
            f"the adapter in {folder} brings no weights for {', '.join(bare)}, and the base {settings.model.base!r} "
            f"has none either; is it an adapter for {settings.task}?"
        )
    return model
