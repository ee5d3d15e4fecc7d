"""Tokens into text as they come: no half characters, no half stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

__all__ = ["TextStream"]

CONTEXT = 6  # tokens of the prompt that are decoded with the first ones: some tokenizers drop a space at a beginning
BROKEN = "\ufffd"  # what an unfinished character decodes to
LONGEST = 8  # tokens that an unfinished character may take; what is still broken then stays so


@final
class TextStream:
    """The text of one answer.

    Args:
        tokenizer: of transformers; None: there is no text.
        prompt: the prompt's tokens.
        stops: texts that end the answer.
        special: whether special tokens are part of it.
        shown: special tokens that are, where others are not.

    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str],
        special: bool = False,
        shown: Sequence[int] = (),
    ) -> None:
        self._hidden = _special(tokenizer).difference(shown) if shown else frozenset()
        self._special = special or bool(shown)
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids = list(prompt[-CONTEXT:])
        self._begin, self._read = 0, len(self._ids)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """(what the token adds to the text, whether a stop text ended it)."""
        if self._tokenizer is None:
            return "", False
        self._ids.append(token)
        before, now = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        late = len(self._ids) - self._read >= LONGEST
        if len(now) <= len(before) or (now.endswith(BROKEN) and not late):
            return "", False
        self._begin, self._read = self._read, len(self._ids)
        return self._cut(now[len(before) :])

    def flush(self) -> str:
        """What was held back, at the end of an answer that no stop text ended."""
        if self._tokenizer is None:
            return ""
        before, now = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        self._read = len(self._ids)
        text, stopped = self._cut(now[len(before) :])
        held, self._held = self._held, ""
        return text if stopped else text + held

    def _decode(self, ids: Sequence[int]) -> str:
        told = [number for number in ids if number not in self._hidden] if self._hidden else list(ids)
        text: str = self._tokenizer.decode(
            told, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False
        )
        return text

    def _cut(self, text: str) -> tuple[str, bool]:
        if not self._stops:
            return text, False
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return held[: min(found)], True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False


def _special(tokenizer: Any) -> frozenset[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*added, *tokenizer.all_special_ids})


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` a stop text may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
