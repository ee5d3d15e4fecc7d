"""Any torch module, with data of one's own: :func:`fit_module`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from ..errors import ConfigError, gather, type_name
from .run import Result, fit
from .running.base_model import Loaded, adapt
from .running.progress import progress_for
from .running.session import Session, check_splits, set_seed
from .settings.sections import AdapterSettings, LogSettings, ModelSettings, TrainingSettings, TrainSettings
from .tasks import Prepared
from .trainer import output_folder
from .trainer.from_settings import best_by

__all__ = ["fit_module"]

Metrics = Callable[[Any, Any], Mapping[str, float]]


def fit_module(
    module: nn.Module,
    train: Dataset[Any],
    loss: Callable[[Any, Any], Tensor],
    output: str | Path,
    *,
    method: str = "vera",
    options: Mapping[str, Any] | None = None,
    validation: Dataset[Any] | None = None,
    test: Dataset[Any] | None = None,
    metrics: Metrics | None = None,
    best_metric: str | None = None,
    collate: Callable[[list[Any]], Any] = default_collate,
    resume: bool = False,
    progress: str = "auto",
    **training: Any,
) -> tuple[nn.Module, Result]:
    """Fine-tune any module: an adapter is put in, trained with transformers' Trainer, and written to ``output``.

    ::

        model, result = fit_module(net, train, nn.functional.cross_entropy, "out", method="lora", options={"r": 8},
                                   validation=held_out, epochs=5, batch_size=32)

    Args:
        module: any module; its weights are frozen, and the adapter is put into it.
        train: map-style, of known length; each row is ``(inputs, labels)``. ``inputs`` is what the module takes: a
            tensor, a tuple for several arguments, or a dict for arguments by name.
        loss: of the module's output and the labels of a batch; a mean over the batch.
        output: a folder that is not there or empty; with ``resume`` one that holds this training.
        method: any method of the library by name, or ``full``.
        options: the method's; ``target_modules`` is 'all-linear' where it is not given, since only transformers' models
            have targets of their own.
        validation, test: as ``train``.
        metrics: of all outputs and all labels of a split, as numpy arrays: a dict of numbers. None: the loss alone.
        best_metric: by which of them an evaluation is the better one; None: the loss. More is better, but for names
            with 'loss' or 'error' in them.
        collate: makes a batch, ``(inputs, labels)``, of rows.
        resume: go on with the training in ``output``.
        progress: as ``logging.progress``.
        training: fields of :class:`kilotune.train.settings.sections.TrainingSettings`: ``epochs``, ``batch_size``, ...

    Returns:
        The model with its trained adapter, and what it came to.

    Raises:
        ConfigError: settings that are wrong; rows that are no pairs; a folder that is in use.
        KilotuneError: see :func:`kilotune.train.run.fit`.

    """
    whole = method in ("full", "head")
    given = {} if whole else {"target_modules": "all-linear", **(options or {})}
    settings = TrainSettings(
        output=str(output),
        model=ModelSettings(base=type_name(module)),
        adapter=AdapterSettings(method=method, options=given if not whole else options or {}),
        training=TrainingSettings(best_metric=best_metric, **training),
        logging=LogSettings(progress=progress, report=False),
    )
    output_folder.refuse_overwriting(Path(output), {}, resume=resume, force=False)
    prepared = _prepared(train, validation, test, metrics, collate)
    check_splits(settings, prepared)
    set_seed(settings.training.seed)
    start = output_folder.fingerprint(module, train, 0)
    model = adapt(Loaded(module), settings, None)
    session = Session(settings, model, None, prepared, None, loss=loss, start=start)
    shown = progress_for(progress, better=best_by(settings, prepared))
    return model, fit(session, resume, listeners=[shown])


def _prepared(
    train: Dataset[Any],
    validation: Dataset[Any] | None,
    test: Dataset[Any] | None,
    metrics: Metrics | None,
    collate: Callable[[list[Any]], Any],
) -> Prepared:
    splits = {"train": train, "validation": validation, "test": test}
    faults = [line for name, rows in splits.items() if rows is not None for line in _faults(name, rows)]
    if faults:
        raise ConfigError(gather("the data cannot be used:", faults))
    return Prepared(
        train=train,
        validation=validation,
        test=test,
        collate=_Pairs(collate),
        labels=None,
        metrics=None if metrics is None else _Scores(metrics),
        reduce_logits=None,
        best_metric="loss",
        greater_is_better=False,
        tokens=0,
        notes=(),
        preview="",
    )


def _faults(name: str, rows: Any) -> list[str]:
    try:
        count = len(rows)
    except TypeError:
        return [f"{name}: a {type_name(rows)} has no length; map-style data sets only"]
    if count == 0:
        return [f"{name}: has no rows"]
    row = rows[0]
    if not isinstance(row, (tuple, list)) or len(row) != 2:
        return [f"{name}: expected rows of (inputs, labels), got a {type_name(row)}"]
    return []


@final
class _Pairs:
    """A batch as the Trainer takes it, of what the collate function gives."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        inputs, labels = self.collate(rows)
        return {"inputs": inputs, "labels": labels}


@final
class _Scores:
    """The metrics as the Trainer calls them."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def __call__(self, predictions: Any) -> dict[str, float]:
        found = self.metrics(predictions.predictions, predictions.label_ids)
        return {name: float(value) for name, value in found.items()}
