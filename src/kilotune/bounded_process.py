"""A process that runs one function for who started it, each call in a child of its own: the program of bounded.py.

It is given ``{"path", "file", "function", "given"}``, loads the function, calls the file's ``prepare`` with what is
given where that is something, and says ``{"ready": true}``. Then it takes calls,
``{"asked", "seconds", "memory", "most"}``, and gives ``{"answer"}``, ``{"raised": [type, text]}`` or
``{"ended": why}``. All of it is JSON behind its length. It imports nothing of kilotune by itself, so it starts soon.

A child has this much time, memory and answer, and opens no files. What it did is gone with it, so that no call sees
anything of another one. Where there is no ``fork``, who started it ends this process after each call.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

LENGTH = 8  # bytes of a length
PIECE = 1 << 16

Function = Callable[[Any], Any]


def load(file: str, function: str, given: Any) -> Function:
    """The function of a file, which is prepared with what is given."""
    spec = importlib.util.spec_from_file_location("bounded_function", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bounded_function"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if given is not None:
        module.prepare(given)
    found: Function = getattr(module, function)
    return found


def read(source: BinaryIO) -> Any:
    """What comes next; None at the end."""
    head = source.read(LENGTH)
    return json.loads(source.read(int.from_bytes(head))) if len(head) == LENGTH else None


def write(out: BinaryIO, data: bytes) -> None:
    """Give what was asked for."""
    out.write(len(data).to_bytes(LENGTH) + data)
    out.flush()


def bound(seconds: float, memory: int) -> None:
    """End by itself when time is up, also where nobody is left who would end this; and open and grow nothing."""
    import resource
    import signal

    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))  # nobody handles it, so it ends the process anywhere
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (_taken() + memory,) * 2)
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (0, 0))


def _taken() -> int:
    """Bytes of address space that this process has already."""
    try:
        with open("/proc/self/statm", "rb") as told:
            return int(told.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def answer(function: Function, asked: Any, most: int) -> bytes:
    """What the function makes of it, as JSON."""
    try:
        made = json.dumps({"answer": function(asked)}).encode()
    except MemoryError:
        return b'{"ended": "memory"}'
    except Exception as error:  # it is the caller's to know
        made = json.dumps({"raised": [type(error).__name__, str(error)[:2000]]}).encode()
    return made if len(made) <= most else b'{"ended": "size"}'


def in_child(function: Function, call: dict[str, Any]) -> bytes:
    """Run a call in a child, which is gone when this returns."""
    import signal

    source, out = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            os.close(0)
            os.close(1)
            bound(call["seconds"], call["memory"])
            data = memoryview(answer(function, call["asked"], call["most"]))
            while data:
                data = data[os.write(out, data) :]
        finally:
            os._exit(0)
    os.close(out)
    made = bytearray()
    while len(made) <= call["most"] + PIECE and (piece := os.read(source, PIECE)):
        made += piece
    os.close(source)  # who writes more than it may ends by that
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return b'{"ended": "time"}'
    try:
        json.loads(made)
    except ValueError:
        return json.dumps({"ended": f"exit status {status}"}).encode()
    return bytes(made)


def main() -> None:
    """Load, and take calls until nobody makes any more."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    given = read(source)
    if given is None:
        return
    sys.path[:] = given["path"]
    try:
        function = load(given["file"], given["function"], given["given"])
    except Exception as error:
        write(out, json.dumps({"failed": f"{type(error).__name__}: {error}"}).encode())
        return
    gc.freeze()  # what is loaded stays, and children need not look through it
    write(out, b'{"ready": true}')
    while (call := read(source)) is not None:
        forks = hasattr(os, "fork")
        write(out, in_child(function, call) if forks else answer(function, call["asked"], call["most"]))


if __name__ == "__main__":
    main()
