"""Chats in which no text of a message makes a mark of a turn.

The template does not see the marks that texts hold: private characters stand for them. What it then writes must have
the same marks as where each text that could be a part of one is a single character. Else a text makes a mark on its way
through the template, trimmed or joined to what stands beside it. Signs around the texts may keep these apart; where
they do not, the chat is refused.
"""

from __future__ import annotations

import bisect
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ...errors import ConfigError
from .spelling import Speller
from .turn_marks import Marks, Message, Text, changed, texts_of

__all__ = ["Again", "Kept", "Neutral", "Write", "Written", "keep_apart"]


@final
@dataclass(frozen=True)
class Written:
    """A chat as a template wrote it.

    Attributes:
        text: the whole.
        answers: (start, end) in characters of the answers in it.
        upto: of how many of the messages.
        prompt: whether it ends where the answer begins.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    upto: int
    prompt: bool = False


FREE = range(0x100000, 0x10FFFE)  # private characters; those of the speller are in another plane

Write = Callable[[Sequence[Message]], list[Written]]
"""Messages, as a template writes them: one text as a rule."""
Again = Callable[[Sequence[Message], bool], str]
"""(messages, whether it ends where the answer begins) -> the text alone."""


@final
@dataclass(frozen=True)
class Neutral:
    """Messages with characters of no meaning where their texts hold marks.

    Attributes:
        messages: for the template.
        back: the character -> the mark that it stands for.
        border: what stands around each text that may be a part of a mark; may be empty.
        mask: a character that a text can be replaced by.
        held: the marks that were replaced -> the first place that each stands in.
        marks: of this template.
    """

    messages: list[dict[str, Any]]
    back: Mapping[str, str]
    border: str
    mask: str
    held: Mapping[str, str]
    marks: Marks

    def restored(self, text: str) -> str:
        """A rendered text, or a piece of it, with the marks of the messages in it again."""
        text = text.replace(self.border, "") if self.border else text
        for stands, mark in self.back.items():
            text = text.replace(stands, mark)
        return text

    def spelled(self, text: str, speller: Speller) -> str:
        """The same for a speller: the template's own tokens go by their other names."""
        return self.restored(speller.renamed(text))

    def counted(self, text: str) -> dict[str, int]:
        """How often each mark stands in a rendered text."""
        return self.marks.counted(text, self.border)

    def masked(self, left: int = 0) -> list[dict[str, Any]]:
        """The messages with one character for each text that may be a part of a mark, but for the first ``left``."""
        seen = 0

        def mask(text: Text) -> str:
            nonlocal seen
            if not _may_hold(self.marks, text):
                return text.text
            seen += 1
            return text.text if seen <= left else text.text.replace(text.text.strip(), self.mask, 1)

        return changed(self.messages, mask)

    def places(self) -> list[str]:
        """Where the texts are that :meth:`masked` replaces."""
        return [text.place for text in texts_of(self.messages) if _may_hold(self.marks, text)]


@final
@dataclass(frozen=True)
class Kept:
    """Messages as a template wrote them, with nothing in them that a text made a mark.

    Attributes:
        neutral: the messages that it was given.
        written: by :data:`Write`.
        held: marks that texts hold, and that are to be spelled out -> where; if there are none, the messages were as
            they came.
    """

    neutral: Neutral
    written: list[Written]
    held: Mapping[str, str]


def keep_apart(marks: Marks, messages: Sequence[Message], write: Write, again: Again) -> Kept:
    """What ``write`` makes of the messages, with their texts kept apart from the marks.

    Raises:
        ConfigError: that cannot be done; with the text and the mark.

    """
    _refuse_plain(marks, messages)
    for borders in (False, True):
        neutral = _neutral(marks, messages, borders)
        written = write(neutral.messages)
        own = _masked(neutral, written, again)
        joined = _joined(neutral, written, own)
        if (
            not joined
            and [*map(neutral.counted, own)] == [neutral.counted(item.text) for item in written]
            and (
                not (neutral.held or neutral.border)
                # The template may look for a mark in a text, or escape what stands for it.
                or [neutral.restored(item.text) for item in written] == [item.text for item in write(messages)]
            )
        ):
            hidden = {mark: "a text" for item, text in zip(written, own) for mark in _hidden(marks, item.text, text)}
            apart = {"a mark": "a text"} if borders and not (neutral.held or hidden) else {}
            return Kept(neutral, written, {**hidden, **neutral.held, **apart})
    place, mark = ("a text", joined) if joined else _culprit(neutral, written, own, again)
    raise ConfigError(
        f"{place} makes {mark!r} in this chat template, the mark of a turn, and it cannot be kept apart from the "
        "template's own: leave it out, or write it in another way"
    )


def _joined(neutral: Neutral, written: Sequence[Written], own: Sequence[str]) -> str | None:
    """A token that only answers may hold, and that stands in a chat more often than the template and answers have it:
    texts make it together, the parts of a message say."""
    if not (tokens := neutral.marks.answers):
        return None
    for item, its in zip(written, own):
        said = "\0".join(text.text for text in texts_of(neutral.messages[: item.upto]))
        for mark in tokens:
            if item.text.count(mark) > its.count(mark) + said.count(mark):
                return mark
    return None


def _masked(neutral: Neutral, written: Sequence[Written], again: Again, left: int = 0) -> list[str]:
    """The same chats without the texts that may be a part of a mark, but for the first ``left`` of them."""
    if not neutral.places():
        return [item.text for item in written]
    messages = neutral.masked(left)
    return [again(messages[: item.upto], item.prompt) for item in written]


def _hidden(marks: Marks, text: str, own: str) -> list[str]:
    """Marks that texts make only after the tokenizer's normalizer."""
    found, its = marks.hidden_in(text), marks.hidden_in(own)
    return [mark for mark, count in found.items() if count != its.get(mark, 0)]


def _culprit(neutral: Neutral, written: Sequence[Written], own: Sequence[str], again: Again) -> tuple[str, str]:
    """Which text makes which mark: the first that makes, with those before it, another count of marks."""
    counts = [*map(neutral.counted, own)]
    more = [
        mark
        for item, its in zip(written, counts)
        for mark, count in neutral.counted(item.text).items()
        if count != its.get(mark, 0)
    ]
    if not more:  # it is the template that does something of its own with what a text holds
        mark, place = next(iter(neutral.held.items()), ("a mark", "a text"))
        return place, mark
    places = neutral.places()

    def differs(left: int) -> bool:
        return counts != [*map(neutral.counted, _masked(neutral, written, again, left))]

    return places[bisect.bisect_left(range(1, len(places)), True, key=differs)], more[0]


def _refuse_plain(marks: Marks, messages: Sequence[Message]) -> None:
    """Refuse texts that could not be told from a mark, and names of roles that may make one."""
    for text in texts_of(messages):
        if not text.answer and (found := marks.plain_in(text.text)):
            raise ConfigError(
                f"{text.place} holds {found[0]!r}, with which the chat template marks a turn. It is no token of its "
                "own, so the model could not tell the two apart: leave it out, or write it in another way"
            )
    for i, message in enumerate(messages):
        if isinstance(role := message.get("role"), str) and (mark := marks.forged_role(role)) is not None:
            raise ConfigError(f"messages[{i}].role is {role!r}, which may make {mark!r}, the mark of a turn: rename it")


def _neutral(marks: Marks, messages: Sequence[Message], borders: bool) -> Neutral:
    """Messages whose texts make no mark by themselves; with ``borders``, not with what stands beside them either."""
    free = _free("".join(text.text for text in texts_of(messages)))
    mask, border = next(free), next(free) if borders else ""
    stands: dict[str, str] = {}
    held: dict[str, str] = {}

    def replaced(text: Text) -> str:
        def stand(mark: str) -> str:
            if mark not in stands:
                stands[mark], held[mark] = next(free), text.place
            return stands[mark]

        found = marks.replaced(text.text, text.answer, stand)
        for mark in marks.plain_in(found) if text.answer else ():
            found = found.replace(mark, stand(mark))
        if not border or not _may_hold(marks, text):
            return found
        core = found.strip()
        return found.replace(core, f"{border}{core}{border}", 1)

    made = changed(messages, replaced)
    return Neutral(made, {sign: mark for mark, sign in stands.items()}, border, mask, held, marks)


def _may_hold(marks: Marks, text: Text) -> bool:
    core = text.text.strip()
    return bool(core) and not text.named and marks.may_hold(core)


def _free(texts: str) -> Iterator[str]:
    """Characters of no meaning that no text has."""
    start = secrets.randbelow(len(FREE))
    for i in range(len(FREE)):
        if (character := chr(FREE[(start + i) % len(FREE)])) not in texts:
            yield character
    raise ConfigError("the messages hold all private characters of Unicode, and some are needed to keep them apart")
