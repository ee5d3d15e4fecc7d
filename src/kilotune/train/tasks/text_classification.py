"""Text classification: a text, or a pair of texts, and its class."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from ...errors import ConfigError, gather
from .. import metrics
from ..data import columns
from ..data.labels import class_names, counted, numbered
from ..data.prepared import Limits, Predictions, Prepared
from ..data.preview import indented
from ..data.processors import load_tokenizer
from ..data.splits import load_splits, shown
from ..data.text_rows import encode_parts, notes_of, padded, read_texts, rows_with
from ..data.token_limits import refuse_unused
from ._base import Task

if TYPE_CHECKING:
    from ..settings.sections import DataSettings

__all__ = ["TextClassification"]


@final
class TextClassification(Task):
    """One class for each text; the classes are those of train, by the alphabet or by number."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    task_type: ClassVar[str | None] = "SEQ_CLS"
    problem_type: ClassVar[str | None] = "single_label_classification"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "text_pair?", "label"),)

    def load_processor(self, base: str, revision: str | None = None) -> Any:
        return load_tokenizer(base, revision)

    def prepare(self, data: DataSettings, processor: Any, limits: Limits, seed: int) -> Prepared:
        refuse_unused(data, self.name, ("max_length",))
        parts = load_splits(data, self.roles, self.name, seed, stratify=True)
        faults: list[str] = []
        texts = {name: read_texts(part, faults) for name, part in parts.items()}
        found = {name: columns.labels(part.table, part.columns["label"], faults) for name, part in parts.items()}
        if faults:
            raise ConfigError(gather("the data cannot be used:", faults))
        one_each = {name: [[label] for label in labels] for name, labels in found.items()}
        names = class_names(parts, one_each, "label", limits.labels)
        numbers = {name: numbered(labels, names) for name, labels in found.items()}
        encoded = encode_parts(processor, texts, data, limits)
        rows = rows_with(encoded, {name: np.asarray(held, np.int64) for name, held in numbers.items()})
        first = shown(parts)
        head = f"{first.table.places[0]}: class {found[first.name][0]!r} ({numbers[first.name][0]} of {len(names)})"
        return Prepared(
            train=rows["train"],
            validation=rows.get("validation"),
            test=rows.get("test"),
            collate=padded(processor, limits),
            labels=names,
            metrics=partial(_score, classes=len(names)),
            reduce_logits=metrics.reduce_to_class,
            best_metric="accuracy",
            greater_is_better=True,
            tokens=encoded["train"].tokens,
            notes=(*notes_of(encoded), *(f"{name}: {counted(held, names)}" for name, held in numbers.items() if held)),
            preview=f"{head}\n{indented(texts[first.name].shown(0))}",
        )


def _score(predictions: Predictions, classes: int) -> dict[str, float]:
    return metrics.classification(predictions.predictions, predictions.label_ids, classes)
