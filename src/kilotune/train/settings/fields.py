"""The fields that settings are made of: each has a check, and the help text that has no other home."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ...config import FrozenDict, number_fault
from ...errors import ConfigError, did_you_mean, gather

__all__ = [
    "EPOCH",
    "Fault",
    "Section",
    "flag",
    "freeze",
    "interval",
    "mapping",
    "number",
    "one_of",
    "or_none",
    "paths",
    "plain",
    "setting",
    "shown",
    "size",
    "text",
    "warmup",
]

EPOCH = "epoch"
Fault = Callable[[str, Any], list[str]]
"""Faults of a value, a line each; the first argument is the field's name."""
S = TypeVar("S", bound="Section")


def setting(default: Any, check: Fault, description: str) -> Any:
    """A dataclass field with its check and its help text."""
    return dataclasses.field(default=default, metadata={"help": description, "check": check})


# -- checks of one value -------------------------------------------------------------------------------


def one_of(*names: str) -> Fault:
    """One of these names."""

    def faults(name: str, value: Any) -> list[str]:
        if value in names:
            return []
        return [f"{name}: expected one of {', '.join(names)}, got {value!r}.{did_you_mean(str(value), names)}"]

    return faults


def number(low: float, high: float = float("inf"), *, whole: bool = False, above: bool = False) -> Fault:
    """A number in [low, high], or in (low, high] with ``above``."""

    def faults(name: str, value: Any) -> list[str]:
        found = number_fault(name, value, low=low, high=high, whole=whole)
        if above and (found or value == low):
            span = f"above {low:g}" + ("" if high == float("inf") else f" and at most {high:g}")
            return [f"{name}: expected a number {span}, got {value!r}"]
        return found

    return faults


def size(low: int) -> Fault:
    """A whole number of bytes, at least ``low``; as large as memory may be."""

    def faults(name: str, value: Any) -> list[str]:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= low
        return [] if good else [f"{name}: expected a whole number of bytes, at least {low}, got {value!r}"]

    return faults


def or_none(check: Fault) -> Fault:
    """None, or what ``check`` takes."""
    return lambda name, value: [] if value is None else check(name, value)


def flag(name: str, value: Any) -> list[str]:
    """True or false."""
    return [] if isinstance(value, bool) else [f"{name}: expected true or false, got {value!r}"]


def text(name: str, value: Any) -> list[str]:
    """Text that is not empty."""
    return [] if isinstance(value, str) and value else [f"{name}: expected text, got {value!r}"]


def paths(name: str, value: Any) -> list[str]:
    """One path, or a list of them."""
    listed = (value,) if isinstance(value, str) else value
    if isinstance(listed, tuple) and listed and all(isinstance(item, str) and item for item in listed):
        return []
    return [f"{name}: expected a path or a list of paths, got {shown(value)}"]


def interval(name: str, value: Any) -> list[str]:
    """A number of steps, or the word ``epoch``."""
    if isinstance(value, str):
        return [] if value == EPOCH else [f"{name}: expected a number of steps or 'epoch', got {value!r}"]
    return number_fault(name, value, low=1, whole=True)


def warmup(name: str, value: Any) -> list[str]:
    """A part below 1, or a whole number of steps."""
    found = number_fault(name, value, low=0)
    if not found and value >= 1 and value != int(value):
        return [f"{name}: expected a part of the steps below 1, or a whole number of steps, got {value!r}"]
    return found


def mapping(name: str, value: Any) -> list[str]:
    """Names with values."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return []
    return [f"{name}: expected names with values, got {shown(value)}"]


def shown(value: Any) -> str:
    """A value as a message shows it: lists as they were written."""
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


# -- sections ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the settings: fields made with :func:`setting`.

    Raises:
        ConfigError: for unknown keys (with the nearest valid one) and for wrong values, all at once.

    """

    SECTION: ClassVar[str] = ""

    def __new__(cls, *args: Any, **values: Any) -> Any:
        faults = ["settings are given by name, not by position"] if args else []
        faults += [cls.unknown(key) for key in values if key not in cls.known()]
        if faults:
            raise ConfigError(gather(f"{cls.__name__}:", faults))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in self.names():
            object.__setattr__(self, name, freeze(getattr(self, name)))
        if faults := self.faults({name: getattr(self, name) for name in self.names()}):
            raise ConfigError(gather(f"{type(self).__name__}:", faults))

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields that are no sections themselves, in order."""
        return [field.name for field in dataclasses.fields(cls) if "help" in field.metadata]

    @classmethod
    def known(cls) -> list[str]:
        """All valid names, those of sections inside included."""
        return cls.names()

    @classmethod
    def help_of(cls, name: str) -> str:
        """The help text of one field."""
        return str({field.name: field for field in dataclasses.fields(cls)}[name].metadata["help"])

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Every field's default."""
        return {field.name: field.default for field in dataclasses.fields(cls) if "help" in field.metadata}

    @classmethod
    def key(cls, name: str) -> str:
        """A field as it is named in a config file: ``training.seed``."""
        return f"{cls.SECTION}.{name}" if cls.SECTION else name

    @classmethod
    def unknown(cls, key: str) -> str:
        """The line for a key that is not there."""
        hint = did_you_mean(str(key), cls.known()) or f" All: {', '.join(cls.known())}"
        return f"{cls.key(str(key))}: there is no such setting.{hint}"

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong with ``values``, which has every field: a line each."""
        checks = {field.name: field.metadata["check"] for field in dataclasses.fields(cls) if "help" in field.metadata}
        found = [line for name, check in checks.items() for line in check(cls.key(name), values[name])]
        return found or cls.together(values)  # fields are held against each other where each is right by itself

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        """What is wrong between fields."""
        return []

    def replace(self: S, **changes: Any) -> S:
        """A copy with some values changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """In plain types, as YAML and JSON write them."""
        return {name: plain(getattr(self, name)) for name in self.names()}


def freeze(value: Any) -> Any:
    """A value as settings hold it: tuples for lists, text for paths, mappings that cannot be changed."""
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def plain(value: Any) -> Any:
    """A value as YAML and JSON write it: the reverse of :func:`freeze`."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
