"""Which column has which role, and whether its values are what the role takes; faults are named by file and line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError, did_you_mean, gather
from .tables import Table

__all__ = ["Groups", "chats", "labels", "numbers", "optional", "resolve", "sound", "texts", "words"]

Groups = tuple[tuple[str, ...], ...]
"""Groups of roles, each of which is enough for a task; a role that ends in ``?`` may be missing."""

# Names that data sets give to a role: only ever suggested, never taken without being asked.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "text": ("content", "sentence", "sentence1", "document", "review", "body", "premise"),
    "text_pair": ("sentence2", "hypothesis"),
    "prompt": ("instruction", "question", "query", "input", "inputs"),
    "completion": ("output", "response", "answer", "answers", "reply", "chosen"),
    "messages": ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"),
    "label": ("labels", "class", "category", "score", "target", "sentiment", "fine_label"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "labels", "ner"),
    "image": ("img", "picture", "file", "file_name", "path"),
    "source": ("input", "document", "article", "text", "src"),
    "target": ("summary", "translation", "output", "highlights", "tgt"),
}
SHOWN = 60
DEEPEST = 60


def optional(role: str) -> bool:
    """Whether the role of a group may be missing."""
    return role.endswith("?")


def resolve(table: Table, given: Mapping[str, str], groups: Groups, task: str, split: str) -> dict[str, str]:
    """Role -> column, for the one group of roles that the columns make up.

    Args:
        table: the rows of a split.
        given: the user's mapping, role -> column; other roles are columns of their own name.
        groups: what the task takes.
        task: its name, for messages.
        split: the setting that the data stands in, for messages.

    Raises:
        ConfigError: a column is missing, or several groups are there and ``given`` does not say which.

    """
    roles = [role.rstrip("?") for group in groups for role in group]
    there = ", ".join(map(repr, table.columns)) or "none"
    faults = [
        f"data.columns.{role}: task {task!r} has no such role; it has {', '.join(dict.fromkeys(roles))}"
        for role in given
        if role not in roles
    ]
    faults += [
        f"data.columns.{role}: {split} has no column {column!r}.{did_you_mean(column, table.columns)} It has: {there}"
        for role, column in given.items()
        if role in roles and column not in table.columns
    ]
    if faults:
        raise ConfigError(gather(f"the columns of {split} do not fit:", faults))
    whole = [group for group in groups if _has_all(table, given, group)]
    whole = [group for group in whole if set(given) <= {role.rstrip("?") for role in group}]
    if len(whole) == 1:
        needed = [role.rstrip("?") for role in whole[0]]
        return {role: given.get(role, role) for role in needed if given.get(role, role) in table.columns}
    if whole:
        choices = "; or ".join(f"{{{', '.join(f'{role}: {role}' for role in group)}}}" for group in whole)
        raise ConfigError(f"{split} has the columns of several kinds of rows; say which, by data.columns: {choices}")
    raise ConfigError(_none_fits(table, given, groups, task, split, there))


def _has_all(table: Table, given: Mapping[str, str], group: Sequence[str]) -> bool:
    return all(optional(role) or given.get(role, role) in table.columns for role in group)


def _none_fits(table: Table, given: Mapping[str, str], groups: Groups, task: str, split: str, there: str) -> str:
    wanted = ", or ".join(" and ".join(role for role in group if not optional(role)) for group in groups)
    roles = list(dict.fromkeys(role for group in groups for role in group if not optional(role)))
    missing = [role for role in roles if given.get(role, role) not in table.columns]
    near = {role: name for role in missing if (name := _near(role, table.columns)) is not None}
    hint = ""
    if near:
        hint = f" If these are they: data.columns: {{{', '.join(f'{role}: {name}' for role, name in near.items())}}}"
    return f"{split}: task {task!r} needs the columns {wanted}, got {there}.{hint}"


def _near(role: str, columns: Sequence[str]) -> str | None:
    """The column that is likely meant by a role."""
    lowered = {column.lower(): column for column in reversed(columns)}
    for name in (role, *OTHER_NAMES.get(role, ())):
        if name in lowered:
            return lowered[name]
    near = did_you_mean(role, columns)
    return near.split("'")[1] if near else None


# -- values --------------------------------------------------------------------------------------------

Check = Callable[[Any], Any]


def _checked(table: Table, column: str, take: Check, faults: list[str]) -> list[Any]:
    """``take`` of every value; a ValueError of it is a fault with its place, and None stands in for the value."""
    found = []
    for row, value in enumerate(table.values(column)):
        try:
            if value is None:
                raise ValueError("is missing")
            found.append(take(value))
        except ValueError as error:
            faults.append(f"{table.places[row]}: {column!r} {error}")
            found.append(None)
    return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def sound(text: str) -> str:
    """``text``, if it is whole: JSON and command lines can hold halves of characters, which no tokenizer takes.

    Raises:
        ValueError: it is not.

    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds {text[error.start]!r}, which is half a character and no text") from None
    return text


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {_shown(value)}, and should be text")
    return sound(value)


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float | np.number) else math.nan
    except (ValueError, OverflowError):  # no number, or one beyond all floats
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"is {_shown(value)}, and should be a finite number")
    return number


def _label(value: Any) -> str | int:
    """A class, as text or as a whole number."""
    if isinstance(value, bool | str):
        if value == "":
            raise ValueError("is empty, and should be a class")
        return sound(str(value))
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float) and value.is_integer():  # tables keep whole numbers with gaps as floats
        return int(value)
    raise ValueError(f"is {_shown(value)}, and should be a class: text or a whole number")


def _list_of(take: Check, what: str) -> Check:
    def check(value: Any) -> list[Any]:
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise ValueError(f"is {_shown(value)}, and should be a list of {what}")
        found = []
        for position, item in enumerate(value, 1):
            try:
                found.append(take(item))
            except ValueError as error:
                raise ValueError(f"has an item {position} that {error}") from None
        return found

    return check


def _message(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        keys = f" (keys: {', '.join(map(str, value))})" if isinstance(value, Mapping) else ""
        raise ValueError(f"is {_shown(value)}{keys}, and should be an object with 'role' and 'content'")
    message = {key: item for key, item in value.items() if item is not None}  # tables fill missing keys with None
    if "content" not in message and "tool_calls" not in message:
        raise ValueError(f"is {_shown(value)}, and has no 'content'")
    _check_content(message.get("content", ""))
    _check_all(message)
    return message


def _check_content(content: Any) -> None:
    """A text, or parts of it; or an object, which templates write as JSON (what a tool gave)."""
    parts = content if isinstance(content, list | tuple | np.ndarray) else [content]
    for part in parts:
        text = part.get("text", "") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if not isinstance(text, str | Mapping):
            raise ValueError(f"has the content {_shown(content)}, and should have text, or a list of parts")


def _check_all(message: Mapping[str, Any]) -> None:
    """Refuse what no template can write rightly, wherever in a message it stands."""
    left: list[tuple[Any, int]] = [(message, 0)]
    while left:
        value, depth = left.pop()
        if depth > DEEPEST:
            raise ValueError(f"is nested more than {DEEPEST} deep")
        if isinstance(value, str):
            sound(value)
        elif isinstance(value, float | np.floating) and not math.isfinite(value):
            raise ValueError(f"holds {value}, which is no number and no text")
        elif isinstance(value, Mapping):
            left += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list | tuple | np.ndarray):
            left += [(item, depth + 1) for item in value]


def _chat(value: Any) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = _list_of(_message, "messages")(value)
    if not messages:
        raise ValueError("is empty, and should be a list of messages")
    return messages


def texts(table: Table, column: str, faults: list[str]) -> list[str]:
    """Values that must be text."""
    return _checked(table, column, _text, faults)


def numbers(table: Table, column: str, faults: list[str]) -> list[float]:
    """Values that must be finite numbers, or text that is one."""
    return _checked(table, column, _number, faults)


def labels(table: Table, column: str, faults: list[str]) -> list[str]:
    """Values that must be classes, as text: numbers by their class names, where the table has some."""
    names = table.classes.get(column)
    return _checked(table, column, lambda value: _class_name(_label(value), names), faults)


def words(table: Table, column: str, faults: list[str]) -> list[list[str]]:
    """Values that must be lists of words, or of classes."""
    names = table.classes.get(column)
    if names is not None:
        take = _list_of(lambda value: _class_name(_label(value), names), "classes")
    else:
        take = _list_of(lambda value: sound(value) if isinstance(value, str) else str(_label(value)), "words")
    return _checked(table, column, take, faults)


def chats(table: Table, column: str, faults: list[str]) -> list[list[dict[str, Any]]]:
    """Values that must be lists of messages, each with a role and content."""
    return _checked(table, column, _chat, faults)


def _class_name(value: str | int, names: Iterable[str] | None) -> str:
    if names is None or isinstance(value, str):
        return str(value)
    listed = tuple(names)
    if not 0 <= value < len(listed):
        raise ValueError(f"is {value}, and the data set names the classes 0 to {len(listed) - 1}")
    return listed[value]
