"""A fine-tuning that is ready to run: the data read, the base loaded, the adapter put in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import nn

from ...errors import ConfigError, gather
from ...model.frozen_inputs import FrozenInputs
from ...model.kept_rows import KeptRows
from ..settings.rates import TakenRate
from ..settings.sections import TrainSettings
from ..tasks import TASKS, Prepared, Task
from ..trainer import output_folder
from ..trainer.failures import advise_on_memory
from . import base_model as models
from .held_dtype import AS_SAVED, Held, held_dtype
from .start_adapter import start_from

if TYPE_CHECKING:
    from ..trainer.adapter_trainer import Loss

__all__ = ["Session", "check_splits", "open_session", "set_seed"]


@final
@dataclass
class Session:
    """A fine-tuning that is ready to run.

    Attributes:
        settings: everything that was asked for.
        model: the model of :func:`kilotune.get_peft_model`; for the methods ``full`` and ``head`` the base itself.
        processor: the tokenizer or image processor; None for a module of one's own.
        prepared: the data.
        task: what is learned; None for a module of one's own.
        loss: for modules that compute none.
        notes: what the user has to know, the data's notes included.
        start: tells the base and the data from others; see :func:`kilotune.train.trainer.output_folder.fingerprint`.
        rate: the learning rate that is trained with, once that is known.
        kept: with ``adapter.last_blocks``, what goes into these blocks, by row; None: it is made when it is needed.
    """

    settings: TrainSettings
    model: nn.Module
    processor: Any
    prepared: Prepared
    task: Task | None
    loss: Loss | None = None
    notes: tuple[str, ...] = ()
    start: Mapping[str, Any] = field(default_factory=dict)
    rate: TakenRate | None = None
    kept: KeptRows | None = None
    frozen: FrozenInputs | None = field(default=None, init=False)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """With ``adapter.last_blocks``, inside this context the blocks before them run once for each row.

        Raises:
            UnsupportedError: in the first forward, if that is not possible with this model.

        """
        run, last = self.settings.training, self.settings.adapter.last_blocks
        if last is None or run.input_cache == "off":
            yield
            return
        if self.kept is None:
            disk = self.settings.output or tempfile.gettempdir()
            self.kept = KeptRows(run.input_cache_mb, disk if run.input_cache == "disk" else None)
        if self.frozen is None:
            self.frozen = FrozenInputs(self.model, last, self.kept)
        with self.frozen:
            yield

    @property
    def folder(self) -> Path:
        """The output folder.

        Raises:
            ConfigError: the settings name none.

        """
        if self.settings.output is None:
            raise ConfigError("output: is missing: the folder for the adapter, its checkpoints and its report")
        return Path(self.settings.output)


# -- open ----------------------------------------------------------------------------------------------


def open_session(settings: TrainSettings, prepared: Prepared | None = None, held: str | None = None) -> Session:
    """Read the data, load the base, put the adapter in.

    Args:
        settings: what to do.
        prepared: data that is ready, as of another session with the same base and data settings.
        held: how a run that is gone on with held its base, where ``model.dtype`` is auto; None: as is best here.

    Raises:
        KilotuneError: whatever is wrong with the settings, the data or the model; nothing is written.

    """
    device = models.device_of(settings.training.device)
    task = _task(settings.task)
    config = models.load_config(settings.model)
    processor = task.load_processor(settings.model.base, settings.model.revision)
    if prepared is None:
        if settings.data.train is None:
            raise ConfigError("data.train: is missing: a file, a folder of images, or hub:NAME")
        prepared = task.prepare(settings.data, processor, models.limits_of(config), settings.training.seed)
    check_splits(settings, prepared)
    set_seed(settings.training.seed)
    with advise_on_memory(settings, "while the base model was loaded"):
        loaded = models.load_base(settings.model, task, prepared, device)
    models.set_padding(loaded.model, processor)
    task.check_model(loaded.model, settings.data)
    rows: Any = prepared.train
    start = output_folder.fingerprint(loaded.model, rows, prepared.tokens, loaded.fresh)
    best = _held(settings, loaded.model, device) if held is None else Held(held)
    best.apply(loaded.model)
    start |= {} if best.how == AS_SAVED else {"held": best.how}
    notes: tuple[str, ...] = (best.note,) if best.note else ()
    if settings.adapter.start is None:
        model = models.adapt(loaded, settings, task)
    else:
        models.hold_in_float32(loaded.model, models.heads_of(loaded, task))
        model, more = start_from(loaded, settings, str(start["base"]))
        notes = (*notes, *more)
    notes = (*prepared.notes, *loaded.notes, *notes)
    return Session(settings, model, processor, prepared, task, notes=notes, start=start)


def _held(settings: TrainSettings, model: nn.Module, device: torch.device) -> Held:
    if settings.adapter.method == "full":
        return Held()  # all of it is trained, in float32 anyway
    return held_dtype(model, settings.model.dtype, device, backward=True)


def _task(name: str) -> Task:
    return TASKS[name]()


def set_seed(seed: int) -> None:
    """Seed Python's, numpy's and PyTorch's generators."""
    models.need_transformers("training").set_seed(seed)


def check_splits(settings: TrainSettings, prepared: Prepared) -> None:
    """Refuse what asks for a validation split where there is none, and a train split without rows.

    Raises:
        ConfigError: all of it at once.

    """
    rows: Any = prepared.train
    faults = [] if len(rows) else ["data.train: holds no row to train on"]
    if prepared.validation is None:
        defaults = settings.training.defaults()
        for name in ("eval_every", "early_stopping", "best_metric", "load_best", "eval_batch_size"):
            value = getattr(settings.training, name)
            if value != defaults[name] and value not in (None, False):
                faults.append(
                    f"training.{name}: {value!r} needs a validation split: give data.validation, or "
                    "data.validation_fraction"
                )
    if faults:
        raise ConfigError(gather("the training cannot start:", faults))
