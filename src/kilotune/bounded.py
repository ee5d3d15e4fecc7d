"""What strangers bring, run in bounded time, memory and size, and outside of every thread of this process.

A regular expression, a chat template or a grammar can take without end. A thread cannot be told to stop, and many such
things let no other thread run meanwhile. So they run in another process, which is told what to load and forks for each
call (bounded_process.py). The child is ended when its time is up; it has memory of its own, opens no files, and sees
nothing of other calls, nor of this process but for what it is asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, final

__all__ = ["KEPT", "ONE_THREAD", "Bounded", "BoundedError", "Bounds"]

PROGRAM = Path(__file__).with_name("bounded_process.py")
LENGTH = 8  # bytes of a length, as there
STARTING = 60.0  # seconds that a process may take to load what it needs
GRACE = 2.0  # seconds beyond its time after which a call is given up from here
KEPT = ("PATH", "HOME", "TZ", "LANG", "LC_ALL", "TMPDIR", "TEMP", "SYSTEMROOT", "LD_LIBRARY_PATH")
"""Of the environment, which may hold passwords; these are told."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "0",
}


@final
@dataclass(frozen=True)
class Bounds:
    """Of one call. seconds: of time. memory: bytes beyond what is loaded. most: bytes of the answer as JSON."""

    seconds: float = 1.0
    memory: int = 2**30
    most: int = 2**26


@final
class BoundedError(Exception):
    """A call came to no answer.

    Attributes:
        why: ``time``, ``memory`` or ``size``: it reached a bound. ``raised``: the function raised. ``process``: there
            is no process, or it ended in another way.

    """

    def __init__(self, why: Literal["time", "memory", "size", "raised", "process"], message: str) -> None:
        super().__init__(message)
        self.why = why


@final
class Bounded:
    """A function of a file, run in other processes. Of any thread; a call waits where all processes have one.

    Args:
        file: where the function is. What the file imports is loaded once, before any call's time begins.
        function: its name; it takes and gives what can be JSON.
        bounds: of each call.
        processes: calls that run at once; each process is started by the first call that needs it.
        given: what the file's function ``prepare`` is called with before any call; None: it is not.

    """

    def __init__(self, file: Path, function: str, bounds: Bounds, processes: int = 1, given: Any = None) -> None:
        self.file, self.function, self.bounds, self._given = file, function, bounds, given
        self._idle: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        self._count = processes
        for _ in range(processes):
            self._idle.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Have a process that is ready, so that the first call need not wait for one.

        Raises:
            BoundedError: there can be none.

        """
        process = self._idle.get()
        try:
            process = process or _Process(self.file, self.function, self._given)
        finally:
            self._idle.put(process)

    def call(self, asked: Any, seconds: float | None = None, spent: Callable[[float], object] | None = None) -> Any:
        """The function's answer.

        Args:
            asked: what it is given.
            seconds: instead of those of the bounds.
            spent: is told the seconds that the call took, without what was waited for a process.

        Raises:
            BoundedError: see there.

        """
        bounds, limit = self.bounds, self.bounds.seconds if seconds is None else seconds
        process = self._idle.get()
        try:
            process = process or _Process(self.file, self.function, self._given)
            began = time.monotonic()
            told = process.ask(
                {"asked": asked, "seconds": limit, "memory": bounds.memory, "most": bounds.most}, limit + GRACE
            )
            if spent is not None:
                spent(time.monotonic() - began)
        finally:
            if process is not None and not process.lasts:
                process.end()
                process = None
            self._idle.put(process)
        if "answer" in told:
            return told["answer"]
        if "raised" in told:
            raise BoundedError("raised", ": ".join(told["raised"]))
        why = told["ended"]
        texts = {
            "time": f"it takes more than {limit:g} s",
            "memory": f"it takes more than {bounds.memory >> 20} MiB of memory",
            "size": f"it makes more than {bounds.most} bytes",
        }
        raise BoundedError(why if why in texts else "process", texts.get(why, f"its process ended: {why}"))

    def close(self) -> None:
        """Let go of the processes; waits for calls that run."""
        for process in [self._idle.get() for _ in range(self._count)]:
            if process is not None:
                process.end()
            self._idle.put(None)


@final
class _Process:
    """One process, and what is written to it and read from it. lasts: whether it takes another call."""

    def __init__(self, file: Path, function: str, prepared: Any) -> None:
        given = {"path": _path(), "file": str(file), "function": function, "given": prepared}
        self.lasts = False
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable or "python",
                    "-I",
                    "-S",
                    str(PROGRAM),
                    str(file),
                ],  # the last is for who lists processes
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**{key: os.environ[key] for key in KEPT if key in os.environ}, **ONE_THREAD},
                start_new_session=True,  # Ctrl-C at a terminal is for this process, which lets running answers end
            )
        except (OSError, RuntimeError) as error:
            raise BoundedError("process", f"it needs a process of its own, which cannot be started: {error}") from None
        told = self.ask(given, STARTING)
        if "ready" not in told:
            self.end()
            raise BoundedError("process", f"its process cannot load {file.name}: {told.get('failed', told)}")

    def ask(self, what: Any, seconds: float) -> dict[str, Any]:
        """Write, and read what comes. After so many seconds the process is ended from here."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.lasts, late = False, threading.Event()

        def give_up() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            data = json.dumps(what).encode()
            self._process.stdin.write(len(data).to_bytes(LENGTH) + data)
            self._process.stdin.flush()
            size = int.from_bytes(self._process.stdout.read(LENGTH))
            told: dict[str, Any] = json.loads(self._process.stdout.read(size))
        except (OSError, ValueError):
            return {"ended": "time" if late.is_set() else f"exit status {self._ended()}"}
        finally:
            timer.cancel()
        self.lasts = hasattr(os, "fork") and not late.is_set()
        return told

    def _ended(self) -> int:
        self._kill()
        return self._process.wait()

    def _kill(self) -> None:
        """End it, with a child that it may have."""
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()

    def end(self) -> None:
        self.lasts = False
        self._kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _path() -> list[str]:
    """Where modules are found, without the folder that somebody happens to be in."""
    own = str(Path(__file__).resolve().parents[1])
    return [*dict.fromkeys([*(str(Path(place).resolve()) for place in sys.path if place), own])]
