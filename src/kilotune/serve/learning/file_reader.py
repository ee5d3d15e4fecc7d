"""Files of strangers, read within bounds: some lines at a time, and all but the smallest in a process of its own.

A template that renders a chat of a thousand turns, and a tokenizer of a text of megabytes, let no other thread run
meanwhile, and nobody can stop them. So a large file is read in pieces by another process, each within time and memory;
between two pieces the job may be cancelled, and another namespace's file has its turn.
"""

from __future__ import annotations

import tempfile
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

from ...bounded import Bounded, BoundedError, Bounds
from ...errors import ConfigError
from ...train.data.rendering import ChatTemplate
from .training_file import MOST_LINE, TOLD, Example, TrainingFile, read_lines

__all__ = ["FileReader"]

FUNCTION = Path(__file__).with_name("training_file_process.py")
HERE = 2**14  # bytes of a file that is read in this process
PIECE = 2**20  # bytes of lines that are read at once, but for a longer line
BOUNDS = Bounds(seconds=60.0, memory=2**30, most=2**28)  # of a piece
SECONDS = 900.0  # of a file
PROCESSES = 2  # files that are read at once, of different namespaces


@final
class _Piece(NamedTuple):
    """Some lines. first: the number of the first one."""

    first: int
    data: bytes

    @property
    def name(self) -> str:
        last = self.first + self.data.rstrip(b"\n").count(b"\n")
        return f"line {self.first}" if last == self.first else f"lines {self.first} to {last}"


@final
class FileReader:
    """Reads files with one tokenizer. From any thread.

    Args:
        tokenizer: of the model.
        longest: tokens that a row may have.
        bounds: of each piece of a file.
        seconds: of a whole one.
        here: bytes of one that is read in this process.

    Raises:
        ConfigError: the tokenizer has no chat template.

    """

    def __init__(
        self, tokenizer: Any, longest: int, bounds: Bounds = BOUNDS, seconds: float = SECONDS, here: int = HERE
    ) -> None:
        self._tokenizer, self._longest, self._seconds, self._here = tokenizer, longest, seconds, here
        self._chats = ChatTemplate(tokenizer)
        self._bounds = bounds
        self._lock = threading.Lock()
        self._turns: weakref.WeakValueDictionary[str, threading.Lock] = weakref.WeakValueDictionary()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: Bounded | None = None

    def close(self) -> None:
        """Let go of the processes; waits for pieces that are read."""
        with self._lock:
            if self._process is not None:
                self._process.close()
            if self._folder is not None:
                self._folder.cleanup()

    def read(
        self, data: bytes, form: str, what: str, namespace: str = "", stay: Callable[[], object] = lambda: None
    ) -> TrainingFile:
        """The examples of a file.

        Args:
            data: of the file.
            form: of its lines, one of FORMS.
            what: the file, for errors.
            namespace: whose it is; of each, one is read at a time.
            stay: is called between pieces, and may raise to end it.

        Raises:
            ConfigError: what is wrong, line by line, up to a number of them; or it takes more than it may.

        """
        turn = self._turns.setdefault(namespace, threading.Lock())
        while not turn.acquire(timeout=1.0):
            stay()
        try:
            examples, faults = self._read(data, form, what, stay)
        finally:
            turn.release()
        if faults:
            told = [f"  - {fault}" for fault in faults[:TOLD]] + ["  - and perhaps more"] * (len(faults) >= TOLD)
            raise ConfigError("\n".join([f"{what} cannot be trained on:", *told]))
        if not examples:
            raise ConfigError(f"{what} cannot be trained on: it has no examples")
        end = self._chats.turn_end
        return TrainingFile(tuple(examples), () if end is None else (end,))

    def _read(self, data: bytes, form: str, what: str, stay: Callable[[], object]) -> tuple[list[Example], list[str]]:
        examples: list[Example] = []
        faults: list[str] = []
        until = time.monotonic() + self._seconds
        for piece in _pieces(data.removeprefix(b"\xef\xbb\xbf")):
            stay()
            left = until - time.monotonic()
            if left <= 0:
                raise ConfigError(
                    f"{what} cannot be trained on: it takes more than {self._seconds:g} s to read, and was read up to "
                    f"line {piece.first}; give fewer or shorter rows"
                )
            try:
                text = piece.data.decode()
            except UnicodeDecodeError as error:
                line = piece.first + piece.data.count(b"\n", 0, error.start)
                at = error.start - piece.data.rfind(b"\n", 0, error.start)
                faults.append(f"line {line}: no UTF-8 at byte {at}")
                break
            if len(text) > PIECE + MOST_LINE:
                faults.append(f"{piece.name}: more than {MOST_LINE} characters")
                continue
            small = len(data) <= self._here
            found, wrong = self._in_here(text, piece, form) if small else self._elsewhere(text, piece, form, what, left)
            examples += found
            faults += wrong
            if len(faults) >= TOLD:
                break
        return examples, faults

    def _in_here(self, text: str, piece: _Piece, form: str) -> tuple[list[Example], list[str]]:
        return read_lines(text, piece.first, form, self._chats, self._tokenizer, longest=self._longest)

    def _elsewhere(
        self, text: str, piece: _Piece, form: str, what: str, left: float
    ) -> tuple[list[Example], list[str]]:
        asked = {"text": text, "first": piece.first, "form": form, "longest": self._longest}
        try:
            found = self._there().call(asked, min(left, self._bounds.seconds))
        except BoundedError as error:  # a tokenizer that finds no memory ends its process
            more = f"; it may have found no memory beyond {self._bounds.memory >> 20} MiB" * (error.why == "process")
            told = f"{piece.name} cannot be read: {error}{more}; give fewer or shorter messages"
            raise ConfigError(f"{what} cannot be trained on: {told}") from None
        examples = [
            Example(
                line, tuple({"input_ids": array("i", ids), "labels": array("i", labels)} for ids, labels in rows), raw
            )
            for line, raw, rows in found["examples"]
        ]
        return examples, found["faults"]

    def _there(self) -> Bounded:
        """The processes, with a tokenizer of their own, once a file needs them."""
        with self._lock:
            if self._process is None:
                self._folder = tempfile.TemporaryDirectory(prefix="kilotune-reader-")
                self._tokenizer.save_pretrained(self._folder.name)
                given = {"folder": self._folder.name}
                self._process = Bounded(FUNCTION, "read", self._bounds, PROCESSES, given)
            return self._process


def _pieces(data: bytes) -> Iterator[_Piece]:
    """Whole lines, in about so many bytes each."""
    begin, first = 0, 1
    while begin < len(data):
        end = data.find(b"\n", begin + PIECE - 1) + 1 or len(data)
        piece = _Piece(first, data[begin:end])
        yield piece
        begin, first = end, first + piece.data.count(b"\n")
