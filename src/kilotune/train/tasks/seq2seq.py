"""Sequence to sequence: a source text and the target that is made of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from ...errors import ConfigError, gather
from .. import metrics
from ..data import columns
from ..data.batches import IGNORED, PaddedBatch
from ..data.prepared import Limits, Predictions, Prepared
from ..data.preview import indented, masked
from ..data.processors import load_tokenizer
from ..data.rows import Rows
from ..data.splits import Part, load_splits, shown
from ..data.text_rows import Texts, encode_texts, notes_of
from ..data.token_limits import check_vocabulary, longest, pad_token, refuse_unused
from ._base import Task

if TYPE_CHECKING:
    from ..settings.sections import DataSettings

__all__ = ["Seq2Seq"]


@final
class Seq2Seq(Task):
    """The encoder reads the source, and the decoder learns to write the target."""

    name: ClassVar[str] = "seq2seq"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    task_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("source", "target"),)
    generates: ClassVar[bool] = True

    def load_processor(self, base: str, revision: str | None = None) -> Any:
        return load_tokenizer(base, revision)

    def prepare(self, data: DataSettings, processor: Any, limits: Limits, seed: int) -> Prepared:
        refuse_unused(data, self.name, ("max_length",))
        size, pad = longest(data, processor, limits), pad_token(processor, limits)
        parts = load_splits(data, self.roles, self.name, seed)
        faults: list[str] = []
        sources = {name: columns.texts(part.table, part.columns["source"], faults) for name, part in parts.items()}
        targets = {name: columns.texts(part.table, part.columns["target"], faults) for name, part in parts.items()}
        if faults:
            raise ConfigError(gather("the data cannot be used:", faults))
        read = {name: encode_texts(processor, Texts(held, None), size, name) for name, held in sources.items()}
        written = {
            name: encode_texts(processor, Texts(held, None), size, name, target=True) for name, held in targets.items()
        }
        for item in (*read.values(), *written.values()):
            check_vocabulary(item.top, processor, limits)
        rows = {
            name: Rows({"input_ids": read[name].values["input_ids"], "labels": written[name].values["input_ids"]})
            for name in parts
        }
        first = shown(parts)
        return Prepared(
            train=rows["train"],
            validation=rows.get("validation"),
            test=rows.get("test"),
            collate=PaddedBatch({"input_ids": pad, "labels": IGNORED}),
            labels=None,
            metrics=partial(_score, processor=processor, pad=pad),
            reduce_logits=partial(metrics.reduce_language, shift=False),
            best_metric="loss",
            greater_is_better=False,
            tokens=read["train"].tokens + written["train"].tokens,
            notes=(
                *(f"source: {note}" for note in notes_of(read)),
                *(f"target: {note}" for note in notes_of(written)),
            ),
            preview=_preview(first, rows[first.name], processor),
            form="source",
        )


def _score(predictions: Predictions, processor: Any, pad: int) -> dict[str, float]:
    """BLEU and its like of what was generated; without generating, how well each token of the target is foretold."""
    said = np.asarray(predictions.predictions)
    if np.issubdtype(said.dtype, np.floating):
        return metrics.language(said)
    texts = [
        processor.batch_decode(np.where(ids == IGNORED, pad, ids), skip_special_tokens=True)
        for ids in (said, np.asarray(predictions.label_ids))
    ]
    return metrics.generation(*texts)


def _preview(part: Part, rows: Rows, processor: Any) -> str:
    source, target = rows[0]["input_ids"], rows[0]["labels"]
    read = indented(processor.decode(source, skip_special_tokens=False))
    head = f"{part.table.places[0]}: {len(source):,} tokens read, {len(target):,} in the loss (learn >)"
    return f"{head}\n{read}\n{masked(processor, target, [True] * len(target))}"
