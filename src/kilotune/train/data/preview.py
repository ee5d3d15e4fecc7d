"""One prepared row as a person reads it, with what the loss leaves out marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

__all__ = ["indented", "masked"]

MASKED, LEARNED = "      | ", "learn > "
LIMIT = 3000  # characters


def masked(tokenizer: Any, ids: Sequence[int], learn: Sequence[bool]) -> str:
    """The text of the tokens; lines that begin with ``learn >`` are what the loss is on, the others are only read."""
    lines: list[str] = []
    for flag, group in groupby(zip(ids, learn), key=lambda item: bool(item[1])):
        text = tokenizer.decode(
            [int(token) for token, _ in group], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        lines += [f"{LEARNED if flag else MASKED}{line}" for line in _lines(text)]
    return shortened("\n".join(lines))


def indented(text: str) -> str:
    """Text that has no loss of its own, such as a classifier's input."""
    return shortened("\n".join(f"{MASKED}{line}" for line in _lines(text)))


def _lines(text: str) -> Iterable[str]:
    """The lines of a text; a line break that ends one is shown, since it is a part of the tokens.

    So are characters that would do something to a terminal, or that nobody sees.
    """
    *lines, rest = ("".join(map(_visible, line)) for line in text.split("\n"))
    return [*(f"{line}\\n" for line in lines), *([rest] if rest else [])]


def _visible(character: str) -> str:
    seen = character.isprintable() or character == "\t"
    return character if seen else character.encode("unicode_escape").decode("ascii")


def shortened(text: str) -> str:
    """The beginning and the end of a long text."""
    if len(text) <= LIMIT:
        return text
    left_out = len(text) - LIMIT
    return f"{text[: LIMIT // 2]}\n   ... {left_out:,} characters are not shown ...\n{text[-LIMIT // 2 :]}"
