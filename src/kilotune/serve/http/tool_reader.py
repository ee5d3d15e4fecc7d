"""Calls of tools in the text of an answer, as it comes.

A text that only looks like a call stays content: broken JSON, a function that there is not. So a call is told once it
is whole. Where a grammar sees to it that what begins as a call is one, it is told piece by piece, and its beginning is
never content: one that is cut before its name is whole is left out. A mark alone is no beginning: a text may speak of
it. Blanks around calls are nobody's words.
"""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

from .tool_bodies import ToolAsk
from .tool_formats import HERMES, ToolFormat, call_head

__all__ = ["Piece", "ToolReader", "called", "delta_of", "reader_of"]


@final
class Piece(NamedTuple):
    """A piece of an answer: content; or of the call of this number: its name with an id, or more of its arguments."""

    content: str = ""
    call: int | None = None
    id: str = ""
    name: str = ""
    arguments: str = ""


def delta_of(piece: Piece) -> dict[str, Any]:
    """A piece as streams have it."""
    if piece.call is None:
        return {"content": piece.content}
    if piece.id:
        begun = {"name": piece.name, "arguments": piece.arguments}
        return {"tool_calls": [{"index": piece.call, "id": piece.id, "type": "function", "function": begun}]}
    return {"tool_calls": [{"index": piece.call, "function": {"arguments": piece.arguments}}]}


def called(pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """All calls, as whole answers have them."""
    calls: list[dict[str, Any]] = []
    for piece in pieces:
        if piece.call is not None and piece.id:
            calls.append(
                {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}
            )
        elif piece.call is not None:
            calls[piece.call]["function"]["arguments"] += piece.arguments
    return calls


class ToolReader(ABC):
    """Of one answer.

    Args:
        ask: what may be called.
        sure: whether a grammar makes a call of what begins as one.
        form: of calls.

    Attributes:
        calls: how many there were.
        cut: whether the answer ended within a call that was sure, so that its arguments are not whole, or it is left
            out.
    """

    def __init__(self, ask: ToolAsk, sure: bool, form: ToolFormat) -> None:
        self.calls, self.cut = 0, False
        self._ask, self._sure, self._form = ask, sure, form
        self._text, self._blanks = "", ""
        self._head = re.compile(rf'\s*\{{"name": ("(?:[^"\\]|\\.)*"), "{form.arguments}": ')
        self._value: _Value | None = None  # of the call that is told piece by piece

    @abstractmethod
    def read(self, text: str) -> Iterator[Piece]:
        """What a text adds."""

    @abstractmethod
    def end(self) -> Iterator[Piece]:
        """What was held back, at the end of the answer."""

    @property
    def open(self) -> bool:
        """Whether the arguments of the last call are not whole yet."""
        return self._value is not None and not self._value.done

    def reason(self, ended: str) -> str:
        """Why the answer ended, as chats say it: with calls, or in another way. After :meth:`end`."""
        return "tool_calls" if self.calls and ended == "stop" and not self.cut else ended

    # -- what readers share ------------------------------------------------------------------------

    def _say(self, text: str) -> Iterator[Piece]:
        """Content, but for the blanks at its end."""
        whole = self._blanks + text
        said = whole.rstrip()
        self._blanks = whole[len(said) :]
        if said:
            yield Piece(said)

    def _say_all(self, text: str) -> Iterator[Piece]:
        """The last content."""
        yield from self._say(text)
        if self._blanks and not self.calls:
            yield Piece(self._blanks)
        self._blanks = ""

    def _call(self, name: str, arguments: str) -> Iterator[Piece]:
        """A call; of those that may not be side by side the first alone is one."""
        self._blanks = ""
        if self.calls and not self._ask.parallel:
            return
        yield Piece(call=self.calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name)
        if arguments:
            yield Piece(call=self.calls, arguments=arguments)
        self.calls += 1

    def _whole(self, text: str) -> tuple[str, str] | None:
        """(name, arguments) of a whole call's JSON; None: it is none."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return self._checked(found)

    def _checked(self, found: Any) -> tuple[str, str] | None:
        name = found.get("name") if isinstance(found, dict) else None
        if not isinstance(name, str) or name not in self._ask.names:
            return None
        given = found.get("arguments", found.get("parameters"))
        if not isinstance(given, dict):
            return None
        return name, json.dumps(given, ensure_ascii=False)

    def _begin(self) -> Iterator[Piece]:
        """Tell the name of a call that is sure, once it is there."""
        if (head := self._head.match(self._text)) is not None:
            self._text, self._value = self._text[head.end() :], _Value()
            yield from self._call(json.loads(head[1]), "")

    def _go_on(self) -> Iterator[Piece]:
        """Tell more of its arguments."""
        assert self._value is not None
        more = self._value.take(self._text)
        self._text = self._text[len(more) :]
        if more:
            yield Piece(call=self.calls - 1, arguments=more)


@final
class HermesReader(ToolReader):
    """``<tool_call>`` JSON ``</tool_call>``, as often as there are calls, between content."""

    _inside = False

    def read(self, text: str) -> Iterator[Piece]:
        self._text += text
        before = None
        while before != (before := (self._text, self._inside, self._value is None)):
            if not self._inside:
                yield from self._outside()
            elif self._sure and self._value is None:
                yield from self._begin() if self._may_begin() else self._go_back()
            elif self._sure and self._value is not None and not self._value.done:
                yield from self._go_on()
            else:
                yield from self._close()

    def _outside(self) -> Iterator[Piece]:
        """Content up to the next call."""
        begin = HERMES.marks[0]
        said, mark, rest = self._text.partition(begin)
        if mark:
            self._text, self._inside = rest, True
        else:
            held = next((n for n in range(len(begin) - 1, 0, -1) if said.endswith(begin[:n])), 0)
            said, self._text = said[: len(said) - held], said[len(said) - held :]
        if said:
            yield from self._say(said)

    def _may_begin(self) -> bool:
        """Whether what follows a mark is a call's beginning so far, as its grammar has them."""
        between = self._form.begin.removeprefix(HERMES.marks[0])
        heads = (between + call_head(self._form, name) for name in self._ask.names)
        return any(self._text.startswith(head) or head.startswith(self._text) for head in heads)

    def _go_back(self) -> Iterator[Piece]:
        """The mark is a word: of a text in JSON, say, or spelled out where a call has a token."""
        self._inside = False
        yield from self._say(HERMES.marks[0])

    def _close(self) -> Iterator[Piece]:
        """The end of a call."""
        inner, mark, rest = self._text.partition(HERMES.marks[1])
        if not mark:
            return
        self._text, self._inside = rest, False
        if self._value is not None:
            self._value = None
        elif (call := self._whole(inner)) is not None:
            yield from self._call(*call)
        else:
            yield from self._say(f"{HERMES.marks[0]}{inner}{mark}")

    def end(self) -> Iterator[Piece]:
        if self._value is not None:  # cut, or its mark is cut
            self.cut = self.open
            return
        if self._sure and (self._inside or (self._ask.must and self._text)):
            self.cut = True
            return
        if self._inside:  # models leave the last mark out at times
            if (call := self._whole(self._text)) is not None:
                yield from self._call(*call)
                return
            self._text = HERMES.marks[0] + self._text
        yield from self._say_all(self._text)


@final
class LlamaReader(ToolReader):
    """JSON of calls and nothing else, with semicolons between; behind ``<|python_tag|>``, or not."""

    _content = False

    def read(self, text: str) -> Iterator[Piece]:
        self._text += text
        if self._value is None and not self._content:
            begun = self._text.lstrip()
            tag = self._form.marks[0]
            self._content = not (begun.startswith(("{", tag)) or tag.startswith(begun))
        if self._content:
            said, self._text = self._text, ""
            yield from self._say(said)
        elif self._sure:
            yield from self._pieces()

    def _pieces(self) -> Iterator[Piece]:
        before = None
        while before != (before := self._text):
            if self._value is None:
                yield from self._begin()
            elif not self._value.done:
                yield from self._go_on()
            elif ";" in self._text:
                self._text, self._value = self._text.partition(";")[2], None

    def end(self) -> Iterator[Piece]:
        if self._value is not None:
            self.cut = self.open
            return
        if self._sure and (self._ask.must or not self._content) and (begun := self._text.strip()):
            self.cut = self._ask.must or begun.startswith("{")
            if self.cut:
                return
        calls = self._all() if not self._content else []
        for call in calls:
            yield from self._call(*call)
        if not calls:
            yield from self._say_all(self._text)

    def _all(self) -> list[tuple[str, str]]:
        """The calls of a whole answer; none where a part of it is no call."""
        rest = self._text.strip().removeprefix(self._form.marks[0])
        found, decoder = [], json.JSONDecoder()
        while rest := rest.strip(" \t\r\n;"):
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return []
            if (call := self._checked(value)) is None:
                return []
            found.append(call)
            rest = rest[end:].lstrip()
            if rest and not rest.startswith(";"):
                return []
        return found


@final
class _Value:
    """An object in JSON, as it comes. done: it has ended."""

    def __init__(self) -> None:
        self.done = False
        self._depth, self._quoted, self._escaped = 0, False, False

    def take(self, text: str) -> str:
        """As much of a text as belongs to it."""
        for at, sign in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = sign == "\\", sign != '"'
            elif sign == '"':
                self._quoted = True
            elif sign in "{[":
                self._depth += 1
            elif sign in "}]":
                self._depth -= 1
                if not self._depth:
                    self.done = True
                    return text[: at + 1]
        return text


def reader_of(form: ToolFormat, ask: ToolAsk, sure: bool) -> ToolReader:
    """What reads the calls of one answer."""
    return (HermesReader if form is HERMES else LlamaReader)(ask, sure, form)
