"""A tokenizer that spells chosen tokens out where they stand in a text, and changes nothing else.

It is a copy in which these tokens go by other names, single characters that no text has. Their own names mean nothing
to the copy, neither as tokens of their own nor in the vocabulary of its model (where Unigram would find them again,
after a normalizer has made ``</s>`` of full-width signs, too). So a text is written with the other names where the
tokens are meant, and with their own where they are only words. Everything else, from normalizer to merges, is as in the
tokenizer itself. What is changed is its file, ``tokenizer.json``; tested with tokenizers 0.23.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from ...errors import ConfigError

__all__ = ["Speller", "any_of"]

PLANE = range(0xF0000, 0xFFFFE)  # a plane of characters that mean nothing by themselves
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@final
class Speller:
    """The copy.

    Args:
        tokenizer: of transformers, with a fast one under it.
        names: the tokens that are to be spelled out.

    Attributes:
        other: token -> the character that stands for it.

    Raises:
        ConfigError: the tokenizer is not a fast one, or its normalizer changes private characters.

    """

    def __init__(self, tokenizer: Any, names: Sequence[str]) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"a {type(tokenizer).__name__} cannot spell out its own tokens; one with a tokenizer.json can"
            )
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        document = json.loads(backend.to_str())
        # Drawn anew in each process, so that nobody can know them and put them into a text.
        start = PLANE.start + secrets.randbelow(len(PLANE) // 2)
        self.other = {name: chr(start + i) for i, name in enumerate(names)}
        self._names = any_of(names)
        self._check_kept(backend.normalizer)
        _rename(document, self.other)
        self._copy = Tokenizer.from_str(json.dumps(document))
        others = {other: name for name, other in self.other.items()}
        self._numbers = {self._copy.token_to_id(other): backend.token_to_id(name) for other, name in others.items()}
        kept = [token["content"] for token in document["added_tokens"]]
        self._numbers |= {
            self._copy.token_to_id(name): backend.token_to_id(name) for name in kept if name not in others
        }

    def _check_kept(self, normalizer: Any) -> None:
        """Other names must come out of the normalizer as they went in, or they would be lost."""
        if normalizer is None:
            return
        lost = [name for name, other in self.other.items() if other not in normalizer.normalize_str(other)]
        if lost:
            raise ConfigError(
                f"this tokenizer's normalizer takes private characters away, so {lost[0]} cannot be renamed"
            )

    def renamed(self, text: str) -> str:
        """A text with the other names instead of the tokens."""
        return self._names.sub(lambda match: self.other[match[0]], text)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Their token numbers, without those that the tokenizer puts around a text."""
        found = self._copy.encode_batch_fast([*texts], add_special_tokens=False)
        return [[self._numbers.get(number, number) for number in one.ids] for one in found]


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the names, of those that begin alike the longest, in one pass however many there are."""
    named = {*names} - {""}
    return re.compile(_branches(named) if named else "(?!)")


def _branches(names: set[str]) -> str:
    """The names as a tree of their common beginnings."""
    first, last = min(names), max(names)
    start = next((first[:i] for i, letter in enumerate(first) if not last.startswith(letter, i)), first)
    rest = {name[len(start) :] for name in names}
    if rest <= {""}:
        return re.escape(start)
    heads = sorted({name[0] for name in rest if name})
    inner = "|".join(_branches({name for name in rest if name[:1] == head}) for head in heads)
    return f"{re.escape(start)}(?:{inner}){'?' if '' in rest else ''}"


def _rename(document: dict[str, Any], other: Mapping[str, str]) -> None:
    """Give tokens their other names in a tokenizer's file."""
    document.update(post_processor=None, truncation=None, padding=None)
    model = document["model"]
    # Pieces for single bytes are how the model writes characters that it does not know: found by their names.
    names = {name: new for name, new in other.items() if not (model.get("byte_fallback") and BYTE.fullmatch(name))}
    document["added_tokens"] = [
        {**token, "content": names[token["content"]], "single_word": False} if token["content"] in names else token
        for token in document["added_tokens"]
        if token["content"] in names or token["content"] not in other
    ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:  # Unigram: pieces with their scores
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _makes(merge, names)]


def _makes(merge: Any, names: Mapping[str, str]) -> bool:
    """Whether a merge of byte pairs has to do with such a token."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
