"""By which names the entries of a configuration take modules: PEFT's rules for patterns and for lists of names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from . import patterns
from .errors import ConfigError
from .patterns import PatternError, members

__all__ = ["at_end", "begins", "ends", "ends_so", "first_at_end", "fits", "group", "named"]

T = TypeVar("T")
LISTED = 32  # names of a list that are gone through; more are looked up


# -- patterns --------------------------------------------------------------------------------------


def fits(field: str, pattern: str, name: str) -> bool:
    """Whether the whole of a name matches (``re.fullmatch``).

    Raises:
        ConfigError: it takes too long, or cannot be matched; with the field of the configuration that it is in.

    """
    try:
        return patterns.found("fullmatch", pattern, name) is not None
    except PatternError as error:
        raise ConfigError(f"{field}: {error}") from error


def begins(field: str, pattern: str, name: str) -> bool:
    """Whether a name matches from its beginning (``re.match``); raises as :func:`fits`."""
    try:
        return patterns.found("match", pattern, name) is not None
    except PatternError as error:
        raise ConfigError(f"{field}: {error}") from error


def group(field: str, pattern: str, name: str) -> str | None:
    """What the last group matches, from a name's beginning; None where it does not match. Raises as :func:`fits`."""
    try:
        found = patterns.found("match", pattern, name)
    except PatternError as error:
        raise ConfigError(f"{field}: {error}") from error
    return None if found is None else found[0]


def at_end(field: str, pattern: str, name: str) -> bool:
    """Whether a pattern is the whole name, or its end after a dot, as PEFT has it; raises as :func:`fits`."""
    anchored = pattern.startswith("^")
    letters = patterns.plain(pattern.removeprefix("^"))
    if letters is None:
        return begins(field, rf"(.*\.)?({pattern})$", name)
    before = len(name) - len(letters)
    if before and (before < 0 or anchored or name[before - 1] != "."):
        return False
    return all(letter == "." or letter[-1] == name[before + i] for i, letter in enumerate(letters))


def first_at_end(field: str, values: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern for which :func:`at_end` holds; raises as :func:`fits`."""
    try:
        with patterns.counted(next(iter(values), "")):
            return next((value for pattern, value in values.items() if at_end(field, pattern, name)), default)
    except PatternError as error:
        raise ConfigError(f"{field}: {error}") from error


# -- lists -----------------------------------------------------------------------------------------


def named(names: Sequence[str], name: str) -> bool:
    """Whether a list has a dotted name, or what stands behind one of its dots."""
    if len(names) <= LISTED:
        return any(name == each or name.endswith(f".{each}") for each in names)
    known = members(names)
    return any(end in known for end in ends(name))


def ends_so(names: Sequence[str], name: str) -> bool:
    """Whether a list has an ending of a name, with or without a dot before it."""
    if len(names) <= LISTED:
        return any(name.endswith(each) for each in names)
    known = members(names)
    return any(name[at:] in known for at in range(len(name) + 1))


def ends(name: str) -> Iterator[str]:
    """A dotted name, and what stands behind each of its dots."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)
