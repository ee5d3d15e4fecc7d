"""What a task is: how data becomes batches and a loss, what the model's head is, and how predictions are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, final

from torch import Tensor, nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from ..settings import DataSettings

__all__ = ["Batch", "Limits", "Predictions", "Prepared", "Row", "Task"]

Row = dict[str, Any]
"""One prepared example: plain lists, numbers or tensors, as the task's ``collate`` takes them."""
Batch = dict[str, Tensor]
"""The keyword arguments of the model's forward, ``labels`` among them."""


class Predictions(Protocol):
    """What transformers' ``EvalPrediction`` has: arrays over all rows of a split, padded with -100."""

    @property
    def predictions(self) -> Any:
        """Of the reduced logits."""

    @property
    def label_ids(self) -> Any:
        """The labels of the batches."""


@final
@dataclass(frozen=True)
class Limits:
    """What the model takes.

    Attributes:
        max_length: positions that it has, in tokens; None: no limit.
        pad_token_id: its padding token; None: the tokenizer's.
        vocabulary: rows of its embedding; None: not known.
        labels: the classes, in order, of a head that is there and is to stay (of an adapter that is gone on from, or
            scored); None: the data says what the classes are.
    """

    max_length: int | None = None
    pad_token_id: int | None = None
    vocabulary: int | None = None
    labels: tuple[str, ...] | None = None


@final
@dataclass(frozen=True)
class Prepared:
    """Data ready for transformers' Trainer (with ``remove_unused_columns=False``: every key of a batch is wanted).

    Attributes:
        train: map-style, of known length; rows ready for ``collate``. Without rows where ``data.train`` is None.
        validation: the same, or None.
        test: the same, or None.
        collate: makes a batch of rows.
        labels: the classes' names in the order of their numbers; None where there are none.
        metrics: the Trainer's ``compute_metrics``: names without ``eval_``; None: the loss alone.
        reduce_logits: the Trainer's ``preprocess_logits_for_metrics``: makes the model's output small before it is
            gathered; None: it is small already.
        best_metric: by which of the metrics, or ``loss``, an evaluation is the better one.
        greater_is_better: whether more of it is better.
        tokens: of one epoch of train, after truncation and without padding; 0 for images.
        notes: what the user has to know: rows cut, left out, warnings. Always shown.
        preview: one example as the model sees it; what the loss leaves out is marked.
        form: of the rows of a model that writes, the role of the first column: messages, prompt, text or source; None
            where nothing is written.
    """

    train: Dataset[Row]
    validation: Dataset[Row] | None
    test: Dataset[Row] | None
    collate: Callable[[list[Row]], Batch]
    labels: tuple[str, ...] | None
    metrics: Callable[[Predictions], dict[str, float]] | None
    reduce_logits: Callable[[Any, Tensor], Tensor] | None
    best_metric: str
    greater_is_better: bool
    tokens: int
    notes: tuple[str, ...]
    preview: str
    form: str | None = None


class Task(ABC):
    """One kind of fine-tuning. A new one is a file here and a line in ``TASKS``.

    Attributes:
        name: as the settings name it.
        auto_class: the name of the transformers class that loads a model for it.
        task_type: the adapter config's ``task_type``; None where there is none for it: the head is a module to save.
        problem_type: the model config's ``problem_type``, which decides its loss; None: the model has one loss.
        roles: groups of columns, each of which is enough; a name that ends in ``?`` may be missing.
        generates: whether a split can also be scored by what ``model.generate`` writes, with transformers'
            ``predict_with_generate``; the metrics then take token numbers.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    task_type: ClassVar[str | None]
    problem_type: ClassVar[str | None] = None
    roles: ClassVar[tuple[tuple[str, ...], ...]]
    generates: ClassVar[bool] = False

    @abstractmethod
    def load_processor(self, base: str, revision: str | None = None) -> Any:
        """The model's own tokenizer or image processor, from a folder or a hub id.

        Raises:
            ConfigError: there is none, or the hub cannot be reached.
            MissingExtraError: transformers is not installed.
        """

    @abstractmethod
    def prepare(self, data: DataSettings, processor: Any, limits: Limits, seed: int) -> Prepared:
        """Read, check, split, and tokenise.

        Raises:
            ConfigError: the data cannot be read or does not fit; all faults of a kind at once, with file and line.
            MissingExtraError: a package that reads this format is not installed.
        """

    def check_model(self, model: nn.Module, data: DataSettings) -> None:
        """Refuse a loaded model that cannot do what the data asks of it (say, packing). Most tasks ask nothing.

        Raises:
            UnsupportedError: with what to change.
        """
        return

    def model_options(self, prepared: Prepared) -> Mapping[str, Any]:
        """What the model's config gets for the head: ``problem_type``, and the labels where there are some."""
        options: dict[str, Any] = {} if self.problem_type is None else {"problem_type": self.problem_type}
        if prepared.labels is not None:
            options["id2label"] = dict(enumerate(prepared.labels))
            options["label2id"] = {label: number for number, label in enumerate(prepared.labels)}
        return options
