"""Pieces of feedback as rows of tokens: what a model is to learn of each.

::

    correction   (the right answer, the given one): a supervised row, and a pair for DPO
    choice       (the better answer, the worse one): a pair
    rating       (the answer, another answer to the prompt): KTO's example

Texts are rendered as training files are, so that a user's text makes no mark of a turn. What cannot be rendered is left
out, and told. A row holds texts of its own lesson alone (and of the guard), so what was taken back is in no other one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, final

from ...errors import ConfigError, first_line
from .feedback import Lesson
from .training_file import Example

__all__ = ["MARK", "Maker", "Marks", "Taught", "Unread", "current", "mark_of", "question_of", "read_lessons"]

MARK = 12  # hexadecimal digits of a lesson's mark
REWORDED = 4  # forms of a question in other words
LEFT_OUT = 0.5  # of a question's words
WORDS = range(4, 65)  # of a question that is put in other words
Maker = Callable[[Mapping[str, Any], str], Example]
"""(what a line of a training file says, its form) -> its rows; raises ConfigError."""
Marks = frozenset[str]


@final
@dataclass(frozen=True, eq=False)
class Taught:
    """A lesson as rows. rows: two (see the module), of which a correction may lack the second. good: of a rating.

    prompt: the same for lessons of one prompt. lesson, make: what a correction's other words are made of.
    """

    mark: str
    name: str
    kind: str
    prompt: str
    rows: tuple[dict[str, Any], ...]
    good: bool = True
    lesson: Lesson | None = None
    make: Maker | None = None

    @cached_property
    def reworded(self) -> tuple[dict[str, Any], ...]:
        """Of a correction, rows of the same answer to its question in other words; there may be none."""
        if self.kind != "correction" or self.lesson is None or self.make is None:
            return ()
        return tuple(_reworded(self.lesson, self.mark, self.make))


@final
class Unread(NamedTuple):
    """A lesson that makes no rows, and why."""

    lesson: Lesson
    mark: str
    why: str


def mark_of(lesson: Lesson) -> str:
    """By what a version knows what it has learned: the same for the same text, whatever it is called."""
    return _digest([lesson.kind, list(lesson.messages), lesson.tools, lesson.answer, lesson.better, lesson.rating])


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:MARK]


def read_lessons(lessons: Iterable[Lesson], make: Maker, others: Sequence[str]) -> tuple[list[Taught], list[Unread]]:
    """Each lesson once, in the order in which they were given last, and those that make no rows.

    Args:
        lessons: of a user.
        make: makes rows.
        others: texts that are no answers to any of them, for KTO.

    """
    found: dict[str, Taught] = {}
    unread: dict[str, Unread] = {}
    for lesson in lessons:
        mark = mark_of(lesson)
        try:
            found[mark] = found.pop(mark) if mark in found else _taught(lesson, mark, make, others)
        except (ConfigError, RecursionError) as error:
            unread.setdefault(mark, Unread(lesson, mark, first_line(error)))
    return list(found.values()), list(unread.values())


def current(lessons: Sequence[Taught]) -> list[Taught]:
    """Without corrections of a prompt that was corrected again later: what was right once may be wrong now."""
    newest = {one.prompt: one.mark for one in lessons if one.kind == "correction"}
    return [one for one in lessons if one.kind != "correction" or newest[one.prompt] == one.mark]


def _taught(lesson: Lesson, mark: str, make: Maker, others: Sequence[str]) -> Taught:
    prompt = _digest([list(lesson.messages), lesson.tools])
    if lesson.kind == "rating":
        other = others[int(mark, 16) % len(others)]
        rows = make(_pair(lesson, lesson.answer, other), "dpo").rows
        return Taught(mark, lesson.name, lesson.kind, prompt, rows, bool(lesson.rating))
    assert lesson.better is not None, "a correction or a choice has a better answer"
    try:
        rows = make(_pair(lesson, lesson.better, lesson.answer), "dpo").rows
    except ConfigError:
        if lesson.kind == "choice":
            raise
        rows = make(_pair(lesson, lesson.better, lesson.better), "dpo").rows[:1]  # what was answered cannot be read
    return Taught(mark, lesson.name, lesson.kind, prompt, rows, lesson=lesson, make=make)


def question_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What was asked: the user's last message; the last one, where none is the user's."""
    asked = [one for one in messages if one.get("role") == "user"] or list(messages)
    return str(asked[-1].get("content") or "") if asked else ""


def _reworded(lesson: Lesson, mark: str, make: Maker) -> Iterator[dict[str, Any]]:
    """The right answer to the question with some of its words left out, every other time its end before its beginning.

    So the answer comes to hang on what is asked, less on how.
    """
    assert lesson.better is not None, "a correction has a right answer"
    place = max((i for i, one in enumerate(lesson.messages) if one.get("role") == "user"), default=None)
    words = question_of(lesson.messages).split()
    if place is None or len(words) not in WORDS:
        return
    draws = random.Random(mark)
    for number in range(REWORDED):
        cut = draws.randrange(1, len(words)) if number % 2 else 0
        left = [word for word in (*words[cut:], *words[:cut]) if draws.random() >= LEFT_OUT]
        messages = [dict(one) for one in lesson.messages]
        messages[place]["content"] = " ".join(left or words[cut:])
        try:
            yield make(_pair(replace(lesson, messages=messages), lesson.better, lesson.better), "dpo").rows[0]
        except ConfigError:  # it is learned in its own words alone
            continue


def _pair(lesson: Lesson, better: str, worse: str) -> dict[str, Any]:
    asked: dict[str, Any] = {"messages": list(lesson.messages)}
    if lesson.tools:
        asked["tools"] = list(lesson.tools)
    first, second = ([{"role": "assistant", "content": text}] for text in (better, worse))
    return {"input": asked, "preferred_output": first, "non_preferred_output": second}
