"""What a chat template marks its turns with, and the texts of messages that hold such marks.

Marks are found by trying: a few chats of known words are rendered, and what stands between the words is the
template's own. Three kinds are told apart. No text may make a token that is special, or that begins or ends a turn of
a user. Only an answer may hold the other tokens that stand between turns (what begins an answer, what frames a tool's
result). Marks that are no tokens (``[INST]``, ``### User:``) look the same wherever they come from, so a text of
anybody but the model may not hold them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np

from ...errors import ConfigError
from .spelling import any_of

__all__ = ["ASSISTANT", "TOOLS", "Marks", "Message", "Text", "changed", "marks_of", "split_tools", "texts_of"]

ASSISTANT = "assistant"
TOOLS = "tools"  # the key of what is no message: the tools that a chat may call, behind the messages
ROLES = (ASSISTANT, "system", "developer", "user", "tool", "function")
Message = Mapping[str, Any]

# Each begins where nothing like it stands before, and a line's blanks hold no line breaks: else long runs of one
# character, which anybody may send, take time that grows with their square.
TAG = re.compile(r"(?<!<)<+[^<>\s\"'={}]+>+|(?<!\[)\[+[^\[\]\s\"'={},:]+\]+")
EMPTY = re.compile(r"<([^<>/\s]+)>\s*</\1>")  # a pair around nothing frames no text: a thought that was left out
BREAKS = r"\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"
LINE = rf"(?:^|[{BREAKS}])[^\S{BREAKS}]*"
HEAD = re.compile(r"[^\w\s.!?]$")
PROBE = re.compile(r"kilotune\d(?:word)?")  # the words of the chats that are tried
MOST = 256  # plain marks of a template; each is looked for in each text
BLANK = "\u2581"  # what SentencePiece writes for a blank


@final
@dataclass(frozen=True)
class Marks:
    """The marks of one tokenizer with its template.

    Attributes:
        never: tokens that no text makes.
        answers: tokens that only an answer may hold.
        plain: marks that are no tokens -> the pattern that finds them in a folded text.
        used: those of all marks that the template writes in the chats that were tried.
        fold: makes of a text what the tokenizer makes of it before it looks for tokens.
    """

    never: tuple[str, ...]
    answers: tuple[str, ...]
    plain: Mapping[str, re.Pattern[str]]
    used: tuple[str, ...]
    fold: Callable[[str], str]

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """All marks that are tokens."""
        return (*self.never, *self.answers)

    @cached_property
    def _tokens(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        return any_of(self.tokens), any_of(self.never)

    def replaced(self, text: str, answer: bool, other: Callable[[str], str]) -> str:
        """A text with something else for each of the tokens that it may not make."""
        return self._tokens[answer].sub(lambda match: other(match[0]), text)

    def plain_in(self, text: str) -> list[str]:
        """The marks in a text that are no tokens."""
        folded = self.fold(text) if self.plain else ""
        return [mark for mark, pattern in self.plain.items() if pattern.search(folded)]

    def counted(self, text: str, border: str = "") -> dict[str, int]:
        """How often each mark stands in a rendered chat; of tokens, those that no text makes.

        Signs at the borders of texts keep tokens apart, but nothing that is no token.
        """
        folded = self.fold(text.replace(border, "") if border else text) if self.plain else ""
        plain = {mark: len(pattern.findall(folded)) for mark, pattern in self.plain.items()}
        return {**Counter(self._tokens[True].findall(text)), **plain}

    def hidden_in(self, text: str) -> dict[str, int]:
        """How often each token stands in a rendered chat after the tokenizer's normalizer, of full-width signs say."""
        return {} if self.fold is str else Counter(self._tokens[True].findall(self.fold(text)))

    def may_hold(self, text: str) -> bool:
        """Whether a text can be a part of a mark at all: it has signs other than letters, or stands in one."""
        return _is_sign(text) or any(text in mark for mark in (*self.tokens, *self.plain))

    def forged_role(self, role: str) -> str | None:
        """A mark that a role of this name may make, where a template puts signs around it; None as a rule."""
        if role.casefold() in ROLES or not role.strip():
            return None
        return next((mark for mark in self.used if role in mark), None)


# -- the marks of a tokenizer --------------------------------------------------------------------------


def marks_of(tokenizer: Any, render: Callable[[Sequence[Message]], str]) -> Marks:
    """The marks of a tokenizer, and of its chat template, which ``render`` runs (its errors are passed over).

    Raises:
        ConfigError: there are too many of them.

    """
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values() if token.content}
    special = {name for name, is_special in added.items() if is_special} | {*map(str, tokenizer.all_special_tokens)}
    turns, heads, plain = _between_turns(render, added)
    if len(plain) > MOST:
        raise ConfigError(f"the chat template has {len(plain)} marks of turns that are no tokens; taken are {MOST}")
    never = special | {name for name in turns if _is_sign(name)}
    return Marks(
        never=tuple(sorted(never - {""})),
        answers=tuple(sorted({name for name in heads if _is_sign(name)} - never)),
        plain=_patterns(plain, fold := _fold_of(tokenizer)),
        used=tuple(sorted({*turns, *heads, *plain})),
        fold=fold,
    )


def _is_sign(name: str) -> bool:
    """Words and blanks that are tokens of their own mark nothing."""
    return bool(re.search(r"[^\w\s]", name))


def _fold_of(tokenizer: Any) -> Callable[[str], str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = None if backend is None else backend.normalizer
    if normalizer is None:
        return str
    return lambda text: str(normalizer.normalize_str(text)).replace(BLANK, " ")


def _patterns(plain: Mapping[str, bool], fold: Callable[[str], str]) -> dict[str, re.Pattern[str]]:
    """Mark -> what finds it. Words are looked for where the template has them: at the beginning of a line, or not."""
    found = {}
    for mark, begins in plain.items():
        folded = fold(mark).strip()
        before = "" if not folded[:1].isalnum() else LINE if begins else r"(?<!\w)"
        if folded:
            found[mark] = re.compile(before + re.escape(folded))
    return found


@final
@dataclass(frozen=True)
class _Frame:
    """What a template writes between two texts. before, after: who said them; None at the ends of the chat."""

    text: str
    before: str | None
    after: str | None


def _between_turns(
    render: Callable[[Sequence[Message]], str], added: Mapping[str, bool]
) -> tuple[set[str], set[str], dict[str, bool]]:
    """(tokens around what a user says, other tokens between turns, plain marks -> whether they begin a line)."""
    turns: set[str] = set()
    heads: set[str] = set()
    plain: dict[str, bool] = {}
    names = any_of(added)
    for messages, of_tools in _probes():
        for frame in _frames(render, messages):
            whole = EMPTY.sub("", frame.text)
            text = _edges(whole, frame) if of_tools or frame.before is None else whole
            (heads if of_tools or frame.after == ASSISTANT else turns).update(names.findall(text))
            for mark, begins in _plain_marks(names.split(text), frame.before is None):
                plain[mark] = begins and plain.get(mark, True)
    return turns, heads, plain


def _probes() -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Chats of known words, and whether they are about tools."""
    said = [{"role": role, "content": f"kilotune{i}word"} for i, role in enumerate(("user", ASSISTANT) * 2)]
    yield said, False
    for role in ("system", "developer"):
        yield [{"role": role, "content": "kilotune9word"}, *said], False
    call = {"id": "kilotune1", "type": "function", "function": {"name": "kilotune7word", "arguments": {}}}
    asked = {"role": ASSISTANT, "content": "", "tool_calls": [call]}
    for role in ("tool", "function"):
        result = {"role": role, "name": "kilotune7word", "tool_call_id": "kilotune1", "content": "kilotune8word"}
        yield [said[0], asked, result, said[1]], True


def _frames(render: Callable[[Sequence[Message]], str], messages: Sequence[Message]) -> list[_Frame]:
    said = [message for message in messages if message["content"]]
    try:
        rest = render(messages)
    except Exception:  # this template takes no such chat: it has no marks for it
        return []
    frames, before = [], None
    for message in said:
        frame, found, rest = rest.partition(message["content"])
        if not found:
            return []
        frames.append(_Frame(frame, before, message["role"]))
        before = message["role"]
    return [*frames, _Frame(rest, before, None)]


def _edges(text: str, frame: _Frame) -> str:
    """The lines that touch a text: what is between is no mark (a system message of the template's own, a call)."""
    if "\n" not in text.strip():
        return text
    begin, end = len(text) - len(text.lstrip()), len(text.rstrip())  # of what is not blank
    first = text[: text.index("\n", begin)] if frame.before not in (None, ASSISTANT) else ""
    last = text[text.rindex("\n", 0, end) :] if frame.after not in (None, ASSISTANT) else ""
    return first + last


def _plain_marks(segments: Sequence[str], first: bool) -> Iterator[tuple[str, bool]]:
    """Tags, and lines without tags that have letters and other signs: ``### User:``, but not ``user`` or ``---``.

    With each, whether it begins a line; ``first``: whether the chat begins with these segments. There, a line that ends
    as a sentence does is the template's own message (a date, say), and not what begins somebody's.
    """
    for part, segment in enumerate(segments):
        for number, line in enumerate(segment.split("\n")):
            if tags := TAG.findall(line):
                yield from ((tag, False) for tag in tags)
                continue
            for words in filter(_is_line, map(str.strip, PROBE.split(line))):
                if not first or HEAD.search(words):
                    yield words, first or part > 0 or number > 0


def _is_line(words: str) -> bool:
    """Not what is between the braces of an object, as templates write a tool's result."""
    return bool(re.search(r"\w", words)) and _is_sign(words) and not re.search(r"[{}\"]", words)


# -- the texts of messages -----------------------------------------------------------------------------


class Text(NamedTuple):
    """A text of a chat.

    Attributes:
        text: itself.
        place: where it stands: ``messages[2].content``.
        answer: whether the model said it: the content of its messages and their other texts, but not a tool's name or
            arguments, which repeat what others said.
        named: whether templates compare it (a role, a type) rather than write it.
    """

    text: str
    place: str
    answer: bool
    named: bool


def changed(messages: Sequence[Message], change: Callable[[Text], str]) -> list[dict[str, Any]]:
    """The messages with what ``change`` gives instead of each of their texts."""
    found = []
    for i, message in enumerate(messages):
        said = message.get("role") == ASSISTANT
        place = "" if TOOLS in message else f"messages[{i}]."
        found.append(
            {
                key: _walk(value, f"{place}{key}", key, said and (key == "content" or _is_text(key, value)), change)
                for key, value in message.items()
            }
        )
    return found


def split_tools(messages: Sequence[Message]) -> tuple[Sequence[Message], list[Any] | None]:
    """(the messages, the tools behind them or None)."""
    if messages and TOOLS in messages[-1]:
        return messages[:-1], list(messages[-1][TOOLS])
    return messages, None


def texts_of(messages: Sequence[Message]) -> list[Text]:
    """All texts of a chat, in order."""
    found: list[Text] = []

    def note(text: Text) -> str:
        found.append(text)
        return text.text

    changed(messages, note)
    return found


def _is_text(key: str, value: Any) -> bool:
    return isinstance(value, str) and key not in ("name", "role")


def _walk(value: Any, place: str, key: str, answer: bool, change: Callable[[Text], str], free: bool = False) -> Any:
    """key: under which it stands. free: within a call's arguments, or a tool's, where the keys are texts too."""
    if isinstance(value, str):
        return change(Text(value, place, answer, key in ("role", "type") and not free))
    if isinstance(value, Mapping):
        held = free or key in ("arguments", "parameters")
        return {
            change(Text(name, place, False, False)) if held and isinstance(name, str) else name: _walk(
                item, f"{place}.{name}", name, answer, change, held
            )
            for name, item in value.items()
        }
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_walk(item, f"{place}[{i}]", key, answer, change, free) for i, item in enumerate(value)]
    return value
