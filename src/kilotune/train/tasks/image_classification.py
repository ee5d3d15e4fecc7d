"""Image classification: a picture and its class."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

from torch.utils.data import Dataset

from ...errors import ConfigError, gather
from .. import metrics
from ..data import columns
from ..data.batches import StackedBatch
from ..data.images import image_fault, open_image
from ..data.labels import class_names, counted, numbered
from ..data.prepared import Limits, Predictions, Prepared, Row
from ..data.processors import load_image_processor
from ..data.splits import Part, load_splits, shown
from ..data.token_limits import refuse_unused
from ._base import Task

if TYPE_CHECKING:
    from ..settings.sections import DataSettings

__all__ = ["ImageClassification", "Pictures"]


@final
class Pictures(Dataset[Row]):
    """Pictures, opened and prepared when they are asked for: ``pixel_values`` (channels, height, width), ``labels``."""

    def __init__(self, part: Part, labels: Sequence[int], processor: Any) -> None:
        self.part, self.labels, self.processor = part, labels, processor
        self._column = part.columns["image"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> Row:
        places = self.part.table.places
        try:
            picture = open_image(self.part.table.rows[row][self._column], places.folder_of(row))
        except ConfigError as error:
            raise ConfigError(f"{places[row]}: {error}") from error
        pixels = self.processor(picture, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[row]}

    def size(self, row: int) -> tuple[int, int]:
        """(width, height) of a picture as it is stored."""
        places = self.part.table.places
        width, height = open_image(self.part.table.rows[row][self._column], places.folder_of(row)).size
        return width, height


@final
class ImageClassification(Task):
    """One class for each picture, prepared by the model's own image processor; no augmentation."""

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    task_type: ClassVar[str | None] = None
    problem_type: ClassVar[str | None] = "single_label_classification"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("image", "label"),)

    def load_processor(self, base: str, revision: str | None = None) -> Any:
        return load_image_processor(base, revision)

    def prepare(self, data: DataSettings, processor: Any, limits: Limits, seed: int) -> Prepared:
        refuse_unused(data, self.name, ())
        parts = load_splits(data, self.roles, self.name, seed, stratify=True)
        faults: list[str] = []
        found = {name: columns.labels(part.table, part.columns["label"], faults) for name, part in parts.items()}
        for part in parts.values():
            faults += _unreadable(part)
        if faults:
            raise ConfigError(gather("the data cannot be used:", faults))
        one_each = {name: [[label] for label in labels] for name, labels in found.items()}
        names = class_names(parts, one_each, "label", limits.labels)
        numbers = {name: numbered(labels, names) for name, labels in found.items()}
        rows = {name: Pictures(part, numbers[name], processor) for name, part in parts.items()}
        first = shown(parts)
        return Prepared(
            train=rows["train"],
            validation=rows.get("validation"),
            test=rows.get("test"),
            collate=StackedBatch(),
            labels=names,
            metrics=partial(_score, classes=len(names)),
            reduce_logits=metrics.reduce_to_class,
            best_metric="accuracy",
            greater_is_better=True,
            tokens=0,
            notes=tuple(f"{name}: {counted(held, names)}" for name, held in numbers.items() if held),
            preview=_preview(rows[first.name], names),
        )


def _score(predictions: Predictions, classes: int) -> dict[str, float]:
    return metrics.classification(predictions.predictions, predictions.label_ids, classes)


def _unreadable(part: Part) -> list[str]:
    """A line for each picture that is not there, or is none by its header."""
    faults = []
    for row, value in enumerate(part.table.values(part.columns["image"])):
        fault = "the image is missing" if value is None else image_fault(value, part.table.places.folder_of(row))
        if fault is not None:
            faults.append(f"{part.table.places[row]}: {fault}")
    return faults


def _preview(rows: Pictures, names: Sequence[str]) -> str:
    width, height = rows.size(0)
    shape = " x ".join(map(str, rows[0]["pixel_values"].shape))
    number = rows.labels[0]
    head = f"{rows.part.table.places[0]}: class {names[number]!r} ({number} of {len(names)})"
    return f"{head}\n      | a picture of {width} x {height} pixels; the model sees {shape}"
