"""A Trainer of transformers' for the settings of a fine-tuning. The loop, the schedule and the files are theirs.

What is ours: the optimizer's groups (:func:`kilotune.optimizer_groups`), a look at each step before the weights change
(:mod:`.failures`), a checkpoint for each best evaluation, errors for full disks, and frozen batch norms that
stay as they are. How the Trainer comes to save adapters only is in :mod:`.for_trainer`.

What touches internals of transformers stands in those and in :mod:`kilotune.train.trainer.adapter_trainer`.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import MissingExtraError
from ...model.adapter_model import AdapterModel
from ..settings.fields import EPOCH
from ..settings.sections import TrainSettings
from ..tasks import Prepared
from .failures import Guard
from .for_trainer import for_trainer

if TYPE_CHECKING:
    from .adapter_trainer import Loss

__all__ = [
    "FEWEST_STEPS",
    "USUAL_EPOCHS",
    "best_by",
    "epochs_of",
    "generating",
    "make_trainer",
    "quiet",
    "steps_of_epoch",
    "total_steps",
]


USUAL_EPOCHS, FEWEST_STEPS = 3, 100  # where nobody says how long it is


def make_trainer(
    settings: TrainSettings,
    model: nn.Module,
    prepared: Prepared,
    folder: Path,
    *,
    loss: Loss | None = None,
    callbacks: Sequence[Any] = (),
    rate: float | None = None,
) -> Any:
    """A ``transformers.Trainer`` for a model of :func:`kilotune.get_peft_model`, or any other model.

    Args:
        settings: everything else.
        model: to train.
        prepared: the data.
        folder: for the checkpoints.
        loss: for modules that return no loss; a batch is then ``{"inputs": ..., "labels": ...}``.
        callbacks: more of the Trainer's callbacks.
        rate: the highest learning rate; None: as the settings say, else by the rule.

    Raises:
        MissingExtraError: transformers or accelerate is not installed.

    """
    arguments = _arguments(settings, model, prepared, folder, rate)
    from .adapter_trainer import AdapterTrainer, Own

    root = for_trainer(model) if isinstance(model, AdapterModel) else model
    guard = Guard(settings, folder)
    own = Own(settings, model, guard, folder, steps_of_epoch(settings, prepared, arguments.world_size), loss)
    own.rate = arguments.learning_rate
    trainer = AdapterTrainer(
        model=root,
        args=arguments,
        data_collator=prepared.collate,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation,
        compute_metrics=prepared.metrics,
        preprocess_logits_for_metrics=prepared.reduce_logits,
        callbacks=[*callbacks, *_early_stopping(settings)],
    )
    trainer.own = own
    if loss is not None:  # a mean, which the Trainer then divides by the number of batches in a step
        trainer.model_accepts_loss_kwargs = False
    return trainer


def _arguments_class() -> tuple[Any, str]:
    """The arguments' class of transformers, and what it calls gradient checkpointing."""
    try:
        import accelerate  # noqa: F401  # else transformers speaks of its own extras
        from transformers import Seq2SeqTrainingArguments
    except ImportError as error:
        raise MissingExtraError((error.name or "accelerate").partition(".")[0], "train", "training") from error
    new = "activation_checkpointing" in Seq2SeqTrainingArguments.__dataclass_fields__
    return Seq2SeqTrainingArguments, "activation_checkpointing" if new else "gradient_checkpointing"  # before 5.23


def _arguments(settings: TrainSettings, model: nn.Module, prepared: Prepared, folder: Path, rate: float | None) -> Any:
    """The settings as ``TrainingArguments``."""
    cls, checkpointing = _arguments_class()
    run = settings.training
    metric, greater = best_by(settings, prepared)
    evaluates = prepared.validation is not None and run.eval_every is not None
    world = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    per_epoch = steps_of_epoch(settings, prepared, world)
    arguments = cls(
        output_dir=str(folder),
        per_device_train_batch_size=run.batch_size,
        per_device_eval_batch_size=run.eval_batch_size or run.batch_size,
        gradient_accumulation_steps=run.accumulation,
        num_train_epochs=epochs_of(settings, prepared, world),
        max_steps=run.max_steps or -1,
        learning_rate=rate or settings.rate(total_steps(settings, prepared, world)),
        weight_decay=run.weight_decay,
        max_grad_norm=run.max_grad_norm or 0.0,
        lr_scheduler_type="constant_with_warmup" if run.schedule == "constant" else run.schedule,
        warmup_steps=run.warmup,
        logging_strategy="steps",
        logging_steps=settings.logging.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide what the guard stops at
        eval_strategy="steps" if evaluates else "no",
        eval_steps=_steps(run.eval_every or EPOCH, per_epoch),
        save_strategy="steps",
        save_steps=_steps(run.saving, per_epoch),
        save_total_limit=run.keep_checkpoints,
        metric_for_best_model=metric if evaluates else None,
        greater_is_better=greater,
        restore_callback_states_from_checkpoint=True,  # the patience of early stopping
        seed=run.seed,
        data_seed=run.seed,
        bf16=run.precision == "bfloat16",
        use_cpu=run.device == "cpu",
        dataloader_num_workers=run.workers,
        dataloader_pin_memory=run.device != "cpu" and torch.cuda.is_available(),
        include_num_input_tokens_seen="non_padding" if prepared.tokens else "no",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=_sometimes_unused(model),
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        **{checkpointing: settings.model.gradient_checkpointing},
    )
    arguments._n_gpu = min(
        1, arguments.n_gpu
    )  # several GPUs in one process would be DataParallel; torchrun is for them
    return arguments


def _sometimes_unused(model: nn.Module) -> bool:
    """Whether a batch may leave something that is trained out: an expert that no token is sent to."""
    return any("expert" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _steps(interval: int | str, per_epoch: int) -> int:
    return per_epoch if isinstance(interval, str) else interval


def steps_of_epoch(settings: TrainSettings, prepared: Prepared, world: int = 1) -> int:
    """Steps of the optimizer in one epoch, as the Trainer counts them; ``world`` is the number of processes."""
    rows = len(prepared.train)  # type: ignore[arg-type]  # map-style, of known length
    batches = math.ceil(math.ceil(rows / settings.training.batch_size) / world)
    return max(1, math.ceil(batches / settings.training.accumulation))


def epochs_of(settings: TrainSettings, prepared: Prepared, world: int = 1) -> float:
    """How often train is gone through: as the settings say, else 3 times, or as often as makes 100 steps."""
    if settings.training.epochs is not None:
        return settings.training.epochs
    return float(max(USUAL_EPOCHS, math.ceil(FEWEST_STEPS / steps_of_epoch(settings, prepared, world))))


def total_steps(settings: TrainSettings, prepared: Prepared, world: int = 1) -> int:
    """Steps of the optimizer in all."""
    each = steps_of_epoch(settings, prepared, world)
    return settings.training.max_steps or math.ceil(epochs_of(settings, prepared, world) * each)


def best_by(settings: TrainSettings, prepared: Prepared) -> tuple[str, bool]:
    """(metric, whether more of it is better) by which the best evaluation is told."""
    metric = settings.training.best_metric or prepared.best_metric
    if metric == prepared.best_metric:
        return metric, prepared.greater_is_better
    return metric, not any(word in metric for word in ("loss", "perplexity", "error", "mae", "mse"))


def _early_stopping(settings: TrainSettings) -> list[Any]:
    if settings.training.early_stopping is None:
        return []
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(early_stopping_patience=settings.training.early_stopping)]


# -- around it -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines of transformers inside, nor traces of TensorBoard's thread; afterwards it is as it was."""
    from transformers.utils import logging

    before, hook = logging.get_verbosity(), threading.excepthook
    logging.set_verbosity_error()
    threading.excepthook = lambda told: None if _writes_for_tensorboard(told.thread) else hook(told)
    try:
        yield
    finally:
        logging.set_verbosity(before)
        threading.excepthook = hook


def _writes_for_tensorboard(thread: threading.Thread | None) -> bool:
    """Whether the main thread gets this thread's error anyway, with its next number for TensorBoard."""
    return type(thread).__module__.startswith("tensorboard.")


@contextlib.contextmanager
def generating(trainer: Any, rows: Any) -> Iterator[None]:
    """Inside, an evaluation lets the model write its answers, the likeliest token each time.

    An answer may become a quarter longer than the longest in ``rows``, and 8 tokens.
    """
    longest = max((len(rows[index]["labels"]) for index in range(len(rows))), default=1)
    before = trainer.preprocess_logits_for_metrics
    trainer.args.predict_with_generate, trainer.args.generation_num_beams = True, 1
    trainer.args.generation_max_length = 1 + longest + longest // 4 + 8  # with the token that begins every answer
    trainer.preprocess_logits_for_metrics = None  # the metrics take the tokens themselves
    try:
        yield
    finally:
        trainer.args.predict_with_generate = False
        trainer.preprocess_logits_for_metrics = before
