"""Read a batch of CIFAR-10's Python version without unpickling it.

A pickle is a small program, and running one that somebody else wrote can do anything. The few instructions
that CIFAR-10's files consist of are therefore interpreted here, as data: a name of a function or class stays
a name, a call stays a note of what was to be called, and any other instruction is refused. No object is ever
built but dictionaries, lists, tuples, numbers, text and bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from ...errors import KilotuneError

__all__ = ["read_batch"]

ARRAY_MAKERS = {f"numpy.{core}.multiarray _reconstruct" for core in ("core", "_core")}
ALLOWED_NAMES = ARRAY_MAKERS | {"numpy ndarray", "numpy dtype", "_codecs encode"}
LITERALS = {
    *("BININT", "BININT1", "BININT2", "INT", "LONG1", "NONE"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINUNICODE", "SHORT_BINUNICODE"),
}


@final
@dataclass
class _Name:
    """A name that the file mentions; never looked up."""

    text: str


@final
@dataclass
class _Call:
    """A call that the file asks for, and the state it wants to give the result; never made."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


@final
class _Mark:
    """The place on the stack where a list's or a dictionary's items begin."""


@final
class _Reader:
    """The stack and memo of one file, and one method per instruction that is not a literal."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[str, Callable[[Any], None]] = {
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "MARK": lambda _: self.stack.append(_Mark()),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "TUPLE": lambda _: self.stack.append(tuple(self.since_mark())),
            "TUPLE1": lambda _: self.stack.append(self.last(1)),
            "TUPLE2": lambda _: self.stack.append(self.last(2)),
            "TUPLE3": lambda _: self.stack.append(self.last(3)),
            "APPEND": lambda _: self.extend(list(self.last(1))),
            "APPENDS": lambda _: self.extend(self.since_mark()),
            "SETITEM": lambda _: self.update(list(self.last(2))),
            "SETITEMS": lambda _: self.update(self.since_mark()),
            "BINPUT": self.remember,
            "LONG_BINPUT": self.remember,
            "MEMOIZE": lambda _: self.remember(len(self.memo)),
            "BINGET": lambda key: self.stack.append(self.memo[key]),
            "LONG_BINGET": lambda key: self.stack.append(self.memo[key]),
            "GLOBAL": self.name,
            "STACK_GLOBAL": lambda _: self.name(" ".join(self.last(2))),
            "REDUCE": lambda _: self.call(),
            "BUILD": lambda _: self.build(),
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "STOP": lambda _: None,
        }

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError("nothing left on the stack")
        taken = tuple(self.stack[-count:])
        del self.stack[-count:]
        return taken

    def since_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(self.stack[-1], _Mark):
            items.append(self.stack.pop())
        self.stack.pop()
        return items[::-1]

    def remember(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("items for something that is not a list")
        self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("items for something that is not a dictionary")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def name(self, text: str) -> None:
        if text not in ALLOWED_NAMES:
            raise TypeError(f"it asks for {text.replace(' ', '.')!r}, which no CIFAR-10 file needs")
        self.stack.append(_Name(text))

    def call(self) -> None:
        name, arguments = self.last(2)
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise TypeError("a call of something that is not a name")
        if name.text == "_codecs encode":  # how Python 3 writes bytes for Python 2 to read
            text, code = arguments
            if not isinstance(text, str) or code != "latin1":
                raise TypeError("text in another code than latin1")
            self.stack.append(text.encode("latin-1"))
        else:
            self.stack.append(_Call(name.text, arguments))

    def build(self) -> None:
        target, state = self.last(2)
        if not isinstance(target, _Call):
            raise TypeError("state for something that is not an object")
        self.stack.append(target)
        target.state = state


def _interpret(content: bytes) -> Any:
    reader = _Reader()
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name in LITERALS:
            reader.stack.append(argument)
        elif instruction.name in reader.steps:
            reader.steps[instruction.name](argument)
        else:
            raise TypeError(f"it uses the instruction {instruction.name}, which no CIFAR-10 file needs")
    (result,) = reader.stack
    return result


def _as_bytes(value: Any) -> bytes:
    """Bytes, or the byte string of Python 2, which is text here."""
    if isinstance(value, str):
        return value.encode("latin-1")
    if not isinstance(value, bytes):
        raise TypeError(f"bytes were expected, not {type(value).__name__}")
    return value


def _pictures(array: Any) -> npt.NDArray[np.uint8]:
    """The array (N, 3072) of bytes that a noted ``numpy.ndarray`` describes."""
    if not isinstance(array, _Call) or array.name not in ARRAY_MAKERS:
        raise TypeError("'data' is not an array")
    _, shape, dtype, fortran, content = array.state
    if not isinstance(dtype, _Call) or dtype.name != "numpy dtype" or _as_bytes(dtype.arguments[0]) != b"u1":
        raise TypeError("'data' does not hold 8-bit numbers")
    if fortran or len(shape) != 2 or shape[1] != 3072:
        raise TypeError(f"'data' has shape {shape}, not (pictures, 3072) row by row")
    return np.frombuffer(_as_bytes(content), np.uint8).reshape(shape)


def _labels(value: Any) -> npt.NDArray[np.int64]:
    if not isinstance(value, list) or not all(type(label) is int for label in value):
        raise TypeError("'labels' is not a list of numbers")
    return np.array(value, dtype=np.int64)


def read_batch(content: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pictures (N, 3072), uint8, and labels (N,), int64, of one file of the Python version.

    Args:
        content: the whole file.
        where: its name, for errors.

    Raises:
        KilotuneError: the file is cut short, is no pickle, or holds anything but what such a file holds.
    """
    try:
        batch = {_as_bytes(key): value for key, value in _interpret(content).items()}
        pictures, labels = _pictures(batch[b"data"]), _labels(batch[b"labels"])
    except Exception as error:  # a hostile file may go wrong in any way, and all of them mean the same
        reason = f"{type(error).__name__}: {error}"
        raise KilotuneError(f"{where} is not a batch of CIFAR-10's Python version ({reason})") from error
    return pictures, labels
