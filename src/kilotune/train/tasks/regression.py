"""Regression: a text, or a pair of texts, and a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from ...errors import ConfigError, gather
from .. import metrics
from ..data import columns
from ..data.prepared import Limits, Predictions, Prepared
from ..data.preview import indented
from ..data.processors import load_tokenizer
from ..data.splits import load_splits, shown
from ..data.text_rows import encode_parts, notes_of, padded, read_texts, rows_with
from ..data.token_limits import refuse_unused
from ._base import Task

if TYPE_CHECKING:
    from ..settings.sections import DataSettings

__all__ = ["Regression"]


@final
class Regression(Task):
    """One number for each text, learned by its squared error, as it stands in the data (nothing is rescaled)."""

    name: ClassVar[str] = "regression"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    task_type: ClassVar[str | None] = "SEQ_CLS"
    problem_type: ClassVar[str | None] = "regression"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "text_pair?", "label"),)

    def load_processor(self, base: str, revision: str | None = None) -> Any:
        return load_tokenizer(base, revision)

    def model_options(self, prepared: Prepared) -> Mapping[str, Any]:
        return {"problem_type": self.problem_type, "num_labels": 1}

    def prepare(self, data: DataSettings, processor: Any, limits: Limits, seed: int) -> Prepared:
        refuse_unused(data, self.name, ("max_length",))
        parts = load_splits(data, self.roles, self.name, seed)
        faults: list[str] = []
        texts = {name: read_texts(part, faults) for name, part in parts.items()}
        found = {name: columns.numbers(part.table, part.columns["label"], faults) for name, part in parts.items()}
        if not faults and len(parts["train"]) and len(set(found["train"])) < 2:
            faults.append(f"data.train: the number is {found['train'][0]:g} in all rows, so there is nothing to learn")
        if faults:
            raise ConfigError(gather("the data cannot be used:", faults))
        encoded = encode_parts(processor, texts, data, limits)
        targets = {name: np.asarray(held, np.float32) for name, held in found.items()}
        rows = rows_with(encoded, targets)
        first = shown(parts)
        return Prepared(
            train=rows["train"],
            validation=rows.get("validation"),
            test=rows.get("test"),
            collate=padded(processor, limits),
            labels=None,
            metrics=_score,
            reduce_logits=metrics.reduce_to_number,
            best_metric="pearson",
            greater_is_better=True,
            tokens=encoded["train"].tokens,
            notes=(*notes_of(encoded), *(_spread(name, held) for name, held in targets.items() if len(held))),
            preview=f"{first.table.places[0]}: {found[first.name][0]:g}\n{indented(texts[first.name].shown(0))}",
        )


def _spread(name: str, values: np.ndarray[Any, np.dtype[np.float32]]) -> str:
    mean, spread = values.mean(), values.std()
    return (
        f"{name}: numbers from {values.min():g} to {values.max():g}, mean {mean:.4g}, standard deviation {spread:.4g}"
    )


def _score(predictions: Predictions) -> dict[str, float]:
    return metrics.regression(predictions.predictions, predictions.label_ids)
