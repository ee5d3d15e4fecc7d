"""Texts, or pairs of texts, as an encoder with a head takes them: with the tokenizer's own special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from . import columns
from .batches import PaddedBatch
from .rows import Ragged, Rows
from .splits import Part
from .token_limits import check_vocabulary, longest, pad_token, share

if TYPE_CHECKING:
    from ..settings.sections import DataSettings
    from .prepared import Limits

__all__ = ["EncodedTexts", "Texts", "encode_parts", "encode_texts", "notes_of", "padded", "read_texts", "rows_with"]

CHUNK = 1000  # rows that are tokenised at once
TYPES = "token_type_ids"


@final
@dataclass(frozen=True)
class Texts:
    """The texts of a split; ``second`` are those that go with them in pairs, or None."""

    first: list[str]
    second: list[str] | None

    def shown(self, row: int) -> str:
        """One row as a person reads it."""
        return self.first[row] if self.second is None else f"{self.first[row]}\n{self.second[row]}"


@final
@dataclass(frozen=True)
class EncodedTexts:
    """Texts as token numbers.

    Attributes:
        values: what the model takes: ``input_ids``, and ``token_type_ids`` where it has them.
        notes: how many were cut.
    """

    values: Mapping[str, Ragged]
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.values["input_ids"].flat)

    @property
    def top(self) -> int:
        """The highest token number."""
        return int(self.values["input_ids"].flat.max(initial=0))


def read_texts(part: Part, faults: list[str]) -> Texts:
    """The columns ``text`` and, if it is there, ``text_pair``."""
    second = part.columns.get("text_pair")
    return Texts(
        columns.texts(part.table, part.columns["text"], faults),
        None if second is None else columns.texts(part.table, second, faults),
    )


def encode_texts(processor: Any, texts: Texts, size: int, split: str, target: bool = False) -> EncodedTexts:
    """Token numbers, at most ``size`` a row: of a pair, the longer text is cut first.

    Args:
        processor: the tokenizer.
        texts: of one split.
        size: tokens per row.
        split: its name, for notes.
        target: whether these are what a decoder is to write.

    """
    names = [name for name in ("input_ids", TYPES) if name in ("input_ids", *processor.model_input_names)]
    rows: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in names}
    long = lost = 0
    for start in range(0, len(texts.first), CHUNK):
        first = texts.first[start : start + CHUNK]
        second = None if texts.second is None else texts.second[start : start + CHUNK]
        given = {"text_target": first} if target else {"text": first, "text_pair": second}
        whole = processor(**given, return_attention_mask=False, verbose=False)
        sizes = [len(ids) for ids in whole["input_ids"]]
        long += sum(count > size for count in sizes)
        lost += sum(max(0, count - size) for count in sizes)
        if max(sizes) > size:
            whole = processor(**given, return_attention_mask=False, verbose=False, truncation=True, max_length=size)
        for name in names:
            rows[name] += [np.asarray(row, np.int32) for row in whole[name]]
    notes = []
    if long:
        cut = share(long, len(texts.first), f"rows of {split}")
        notes.append(f"{cut} longer than {size:,} tokens: cut there; {lost:,} tokens are lost")
    return EncodedTexts({name: Ragged(values, np.int32) for name, values in rows.items()}, tuple(notes))


def encode_parts(
    processor: Any, texts: Mapping[str, Texts], data: DataSettings, limits: Limits
) -> dict[str, EncodedTexts]:
    """Split -> its token numbers, held against what the model takes.

    Token types are left out where all are 0, which is what a model with them takes them for: some tokenizers of models
    without them give them too.
    """
    size = longest(data, processor, limits)
    encoded = {name: encode_texts(processor, text, size, name) for name, text in texts.items()}
    for item in encoded.values():
        check_vocabulary(item.top, processor, limits)
    if any(item.values[TYPES].flat.any() for item in encoded.values() if TYPES in item.values):
        return encoded
    return {name: EncodedTexts({"input_ids": item.values["input_ids"]}, item.notes) for name, item in encoded.items()}


def rows_with(encoded: Mapping[str, EncodedTexts], targets: Mapping[str, Any]) -> dict[str, Rows]:
    """Split -> rows of token numbers with their labels (an array per split)."""
    return {name: Rows({**item.values, "labels": targets[name]}) for name, item in encoded.items()}


def notes_of(encoded: Mapping[str, EncodedTexts]) -> list[str]:
    """What was cut, of all splits."""
    return [note for item in encoded.values() for note in item.notes]


def padded(processor: Any, limits: Limits) -> PaddedBatch:
    """Batches of such rows."""
    types = getattr(processor, "pad_token_type_id", 0)
    return PaddedBatch({"input_ids": pad_token(processor, limits), TYPES: types})
