"""Functions in processes of their own: bounded, apart from each other, and in nobody's way."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kilotune.bounded import Bounded, BoundedError, Bounds

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forks")
USUAL = Bounds()
FUNCTIONS = """
import os, socket, time
seen = []

def run(asked):
    seen.append(asked)
    return {"last": asked, "seen": len(seen)}

def wait(asked):
    while True:
        asked += 1

def grow(asked):
    text = "x" * 1000
    while True:
        text += text

def large(asked):
    return "x" * asked

def fail(asked):
    raise LookupError(f"no {asked}")

def open_file(asked):
    return open(asked).read()

def connect(asked):
    socket.socket()

def environment(asked):
    return dict(os.environ)

def end(asked):
    os._exit(asked)

def pid(asked):
    return [os.getpid(), os.getppid()]
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    return tmp_path / "functions.py"


def told(functions: Path, name: str, asked: object, bounds: Bounds = USUAL) -> BoundedError:
    with Bounded(functions, name, bounds) as made, pytest.raises(BoundedError) as found:
        made.call(asked)
    return found.value


def test_answers_come_and_no_call_sees_another(functions: Path) -> None:
    with Bounded(functions, "run", Bounds()) as made:
        made.start()
        for asked in ("ann's", {"of": ["bob", None, 1.5]}, "\ud800", "é" * 100_000):
            assert made.call(asked) == {"last": asked, "seen": 1}


def test_time_ends(functions: Path) -> None:
    began = time.monotonic()
    error = told(functions, "wait", 0, Bounds(seconds=0.3))
    assert (error.why, str(error)) == ("time", "it takes more than 0.3 s")
    assert time.monotonic() - began < 3.0


@forks
def test_memory_ends(functions: Path) -> None:
    error = told(functions, "grow", 0, Bounds(seconds=20.0, memory=2**26))
    assert (error.why, str(error)) == ("memory", "it takes more than 64 MiB of memory")


def test_size_ends(functions: Path) -> None:
    assert told(functions, "large", 5000, Bounds(most=4000)).why == "size"
    with Bounded(functions, "large", Bounds(most=4000)) as made:
        assert made.call(3000) == "x" * 3000


def test_what_it_raises_is_told_and_the_process_goes_on(functions: Path) -> None:
    error = told(functions, "fail", 3)
    assert (error.why, str(error)) == ("raised", "LookupError: no 3")
    assert told(functions, "run_not_there", 1).why == "process"
    assert "exit status 3" in str(told(functions, "end", 3))


@forks
def test_files_and_sockets_cannot_be_opened(functions: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    for name, asked in (("open_file", str(tmp_path / "secret")), ("open_file", "/proc/self/environ"), ("connect", 0)):
        error = told(functions, name, asked)
        assert error.why == "raised"
        assert "Too many open files" in str(error)


def test_the_environment_is_not_given(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "s")
    with Bounded(functions, "environment", Bounds()) as made:
        assert "DATABASE_PASSWORD" not in made.call(0)


@forks
def test_a_process_that_was_killed_is_started_anew(functions: Path) -> None:
    with Bounded(functions, "pid", Bounds()) as made:
        child, process = made.call(0)
        assert made.call(0)[1] == process
        assert made.call(0)[0] != child
        os.kill(process, signal.SIGKILL)
        with pytest.raises(BoundedError, match="its process ended"):
            made.call(0)
        assert made.call(0)[1] != process
        last = made.call(0)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_others_go_on_meanwhile(functions: Path) -> None:
    """A call that takes its time holds neither the interpreter nor, with a second process, other calls."""
    with Bounded(functions, "wait", Bounds(seconds=1.0), processes=2) as made:
        ends = list[str]()

        def run() -> None:
            with pytest.raises(BoundedError) as found:
                made.call(0)
            ends.append(found.value.why)

        made.start()
        threads = [threading.Thread(target=run) for _ in range(2)]
        began = last = time.monotonic()
        for thread in threads:
            thread.start()
        longest = 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert ends == ["time", "time"]
        assert longest < 0.5
        assert time.monotonic() - began < 2.0 + 2.0, "both ran at once"


@forks
def test_without_fork_each_call_has_a_process(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the process itself runs the call, and is ended behind it."""
    program = Path(__file__).parents[1] / "src" / "kilotune" / "bounded_process.py"
    other = functions.with_name("without_fork.py")
    other.write_text(f"import os\ndel os.fork\nexec(compile(open({str(program)!r}).read(), 'program', 'exec'))\n")
    monkeypatch.setattr("kilotune.bounded.PROGRAM", other)
    monkeypatch.delattr(os, "fork")
    with Bounded(functions, "run", Bounds(seconds=0.5)) as made:
        assert made.call(1) == {"last": 1, "seen": 1}
        assert made.call(2) == {"last": 2, "seen": 1}
    monkeypatch.setattr("kilotune.bounded.GRACE", 0.2)
    assert told(functions, "wait", 0, Bounds(seconds=0.3)).why == "time"


def test_where_there_is_no_python_that_is_told(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python/here")
    error = told(functions, "run", 0)
    assert (error.why, "cannot be started" in str(error)) == ("process", True)


@forks
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_nothing_is_left_behind_a_closed_one(functions: Path) -> None:
    with Bounded(functions, "pid", Bounds()) as made:
        process = made.call(0)[1]
        assert [*of_group(process)] == [process]
    assert not [*of_group(process)]


def of_group(group: int) -> Iterator[int]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                    yield int(folder.name)
            except OSError:
                continue
