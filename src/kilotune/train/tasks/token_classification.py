"""Token classification: a class for each word, such as the names in a sentence or its parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from ...errors import ConfigError, gather
from .. import metrics
from ..data import columns
from ..data.batches import IGNORED, PaddedBatch
from ..data.labels import class_names, counted, numbered
from ..data.prepared import Limits, Predictions, Prepared
from ..data.processors import load_tokenizer
from ..data.rows import Ragged, Rows
from ..data.splits import Part, load_splits, shown
from ..data.token_limits import check_vocabulary, longest, pad_token, refuse_unused, share
from ._base import Task

if TYPE_CHECKING:
    from ..settings.sections import DataSettings

__all__ = ["TokenClassification"]

CHUNK = 1000  # rows that are tokenised at once


@final
@dataclass(frozen=True)
class _Tagged:
    """Token numbers, and the class of each token: of the first of a word its word's, else -100."""

    ids: list[list[int]]
    labels: list[list[int]]
    notes: list[str]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


@final
class TokenClassification(Task):
    """One class for each word. The first token of a word carries it, and the loss leaves the others out."""

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    task_type: ClassVar[str | None] = "TOKEN_CLS"
    roles: ClassVar[tuple[tuple[str, ...], ...]] = (("tokens", "tags"),)

    def load_processor(self, base: str, revision: str | None = None) -> Any:
        return load_tokenizer(base, revision)

    def prepare(self, data: DataSettings, processor: Any, limits: Limits, seed: int) -> Prepared:
        refuse_unused(data, self.name, ("max_length",))
        if not processor.is_fast:
            raise ConfigError("token-classification needs a fast tokenizer, which says which token is of which word")
        size, pad = longest(data, processor, limits), pad_token(processor, limits)
        parts = load_splits(data, self.roles, self.name, seed)
        words, tags = _read(parts)
        names = class_names(parts, tags, "tags", limits.labels)
        numbers = {name: [numbered(row, names) for row in rows] for name, rows in tags.items()}
        tagged = {name: _align(processor, words[name], numbers[name], size, name) for name in parts}
        for split in tagged.values():
            check_vocabulary(max((max(ids, default=0) for ids in split.ids), default=0), processor, limits)
        rows = {
            name: Rows({"input_ids": Ragged(split.ids, np.int32), "labels": Ragged(split.labels, np.int32)})
            for name, split in tagged.items()
        }
        first = shown(parts)
        return Prepared(
            train=rows["train"],
            validation=rows.get("validation"),
            test=rows.get("test"),
            collate=PaddedBatch({"input_ids": pad, "labels": IGNORED}),
            labels=names,
            metrics=partial(_score, names=names),
            reduce_logits=metrics.reduce_to_class,
            best_metric="f1" if metrics.is_iob(names) else "f1_macro",
            greater_is_better=True,
            tokens=tagged["train"].tokens,
            notes=(
                *(note for split in tagged.values() for note in split.notes),
                *(
                    f"{name}: {counted([i for row in held for i in row], names)}"
                    for name, held in numbers.items()
                    if held
                ),
            ),
            preview=_preview(first, tagged[first.name], names, processor),
        )


def _score(predictions: Predictions, names: Sequence[str]) -> dict[str, float]:
    return metrics.tagging(predictions.predictions, predictions.label_ids, names)


def _read(parts: Mapping[str, Part]) -> tuple[dict[str, list[list[str]]], dict[str, list[list[str]]]]:
    """(words, tags) of every split, as many of the one as of the other."""
    faults: list[str] = []
    words = {name: columns.words(part.table, part.columns["tokens"], faults) for name, part in parts.items()}
    tags = {name: columns.words(part.table, part.columns["tags"], faults) for name, part in parts.items()}
    for name, part in parts.items():
        for row, (one, other) in enumerate(zip(words[name], tags[name])):
            if one is not None and other is not None and len(one) != len(other):
                faults.append(f"{part.table.places[row]}: {len(one)} words and {len(other)} tags; each word needs one")
    if faults:
        raise ConfigError(gather("the data cannot be used:", faults))
    return words, tags


def _align(
    processor: Any, words: Sequence[Sequence[str]], tags: Sequence[Sequence[int]], size: int, split: str
) -> _Tagged:
    """The words as one text with blanks between them, as models have seen texts, and each word's first token found."""
    found = _Tagged([], [], [])
    cut = lost = vanished = 0
    for start in range(0, len(words), CHUNK):
        chunk = words[start : start + CHUNK]
        encoded = processor([" ".join(row) for row in chunk], return_offsets_mapping=True, verbose=False)
        shorter = processor([" ".join(row) for row in chunk], truncation=True, max_length=size, verbose=False)
        for row, wanted in enumerate(tags[start : start + CHUNK]):
            ids = list(map(int, shorter["input_ids"][row]))
            of_word = _words_of_tokens(chunk[row], encoded["offset_mapping"][row])
            there = set(of_word) - {None}
            if len(ids) < len(of_word):  # what stands behind the words is special tokens, and stays
                behind = len(of_word) - 1 - max((at for at, word in enumerate(of_word) if word is not None), default=-1)
                of_word = [*of_word[: len(ids) - behind], *([None] * behind)]
                cut += 1
                lost += len(there - set(of_word))
            vanished += len(wanted) - len(there)
            found.ids.append(ids)
            found.labels.append(_labels(of_word, wanted))
    if cut:
        rows = share(cut, len(words), f"rows of {split}")
        found.notes.append(f"{rows} longer than {size:,} tokens: cut there; {lost:,} words are lost, and not scored")
    if vanished:
        note = f"{split}: of {vanished:,} words the tokenizer leaves nothing; they are not learned or scored"
        found.notes.append(note)
    return found


def _words_of_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The word that each token belongs to, by its last character: some tokens begin with the blank before a word."""
    at: list[int | None] = []
    for number, word in enumerate(words):
        at += [*([number] * len(word)), None]
    return [at[end - 1] if end > begin else None for begin, end in offsets]


def _labels(of_word: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    seen: set[int | None] = {None}
    labels = []
    for word in of_word:
        labels.append(IGNORED if word is None or word in seen else tags[word])
        seen.add(word)
    return labels


def _preview(part: Part, tagged: _Tagged, names: Sequence[str], processor: Any) -> str:
    tokens = processor.convert_ids_to_tokens(tagged.ids[0])
    lines = [
        f"      | {token}" if label == IGNORED else f"learn > {token}  {names[label]}"
        for token, label in zip(tokens, tagged.labels[0])
    ]
    more = [] if len(lines) <= 40 else [f"   ... {len(lines) - 40} tokens are not shown ..."]
    head = f"{part.table.places[0]}: {len(tokens)} tokens, {sum(at != IGNORED for at in tagged.labels[0])} in the loss"
    return "\n".join([f"{head} (learn >)", *lines[:40], *more])
