"""What a task is: how data becomes batches and a loss, what the model's head is, and how predictions are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..data.prepared import Limits, Prepared
from ..settings.sections import DataSettings

__all__ = ["Task"]


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
