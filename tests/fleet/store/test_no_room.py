"""Stores on a full disk, or on one that cannot be written to: one error that says so, and nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kilotune.errors import StoreError, StoreFullError, StoreLimitError
from kilotune.fleet.store import AdapterStore, open_store, sqlite
from kilotune.fleet.store import sql as sql_module
from tests.support.paths import ROOT
from tests.support.store_support import contents

FULL = "the disk is full"
READ = "open it read-only to read it"
SCRIPT = """
import json, os, sys
from pathlib import Path
from kilotune.errors import StoreError
from kilotune.fleet.store import open_store
from tests.support.store_support import contents

place = Path(sys.argv[1])
url = f"sqlite:///{place}/a.db"
told = {}

def fill():
    with open(place / "fill", "ab", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass

def noted(what, call):
    try:
        told[what] = ["done", repr(call())]
    except StoreError as error:
        told[what] = [type(error).__name__, str(error)]

def opened(work, **options):
    with open_store(url, **options) as store:
        return work(store)

for number in range(12):
    opened(lambda store: store.put(f"a{number % 3}", contents(number), alias="live" if number % 2 else None))
store = open_store(url)
store.get("a1")
fill()
noted("put", lambda: store.put("b", contents(1)))
noted("rm", lambda: store.rm("a2"))
noted("gc", lambda: store.gc(keep=1))
noted("compact", lambda: store.gc(compact=True))
noted("get", lambda: store.get("a1").info.version)
noted("close", store.close)
fill()
noted("open and rm", lambda: opened(lambda store: store.rm("a2")))
noted("open and gc", lambda: opened(lambda store: store.gc(keep=1)))
noted("read", lambda: opened(lambda store: store.get("a1"), read_only=True))
noted("new", lambda: open_store(f"sqlite:///{place}/new.db"))
told["files"] = sorted(os.listdir(place))
os.remove(place / "fill")
noted("all", lambda: opened(lambda store: (list(store.verify()), store.stats().versions)))
links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
told["open"] = [path for link in links if os.path.exists(link) and str(place) in (path := os.readlink(link))]
assert os.system(f"mount -o remount,ro {place}") == 0
noted("ro rm", lambda: opened(lambda store: store.rm("a2")))
noted("ro gc", lambda: opened(lambda store: store.gc(keep=1)))
noted("ro read", lambda: opened(lambda store: store.get("a1").info.version, read_only=True))
print(json.dumps(told))
"""


def in_a_mount_of_its_own(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command with a file system of 512 KiB at ``place``, which nobody else sees."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not there (Linux's util-linux)")
    mounted = f"mount -t tmpfs -o size=512k tmpfs {place}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system of their own")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    command = ["unshare", "-rm", "sh", "-c", f'{mounted} && exec "$@"', "sh", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


@pytest.mark.heavy
def test_a_full_disk_and_one_that_is_only_read(tmp_path: Path) -> None:
    """A real one: what cannot be changed is as it was, and each call says why and what to do."""
    made = in_a_mount_of_its_own(tmp_path, sys.executable, "-c", SCRIPT, str(tmp_path))
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    for what in ("put", "rm", "gc", "compact", "open and rm", "open and gc", "read", "new"):
        kind, text = told[what]
        assert (what, kind) == (what, "StoreFullError"), text
        assert FULL in text
        assert text.endswith("make room, and do it again")
    assert told["get"] == ["done", "4"]
    assert told["close"] == ["done", "None"]
    assert "new.db" not in told["files"]
    assert told["all"] == ["done", "([], 12)"]
    assert told["open"] == [], "what cannot be opened leaves no file open"
    for what in ("ro rm", "ro gc"):
        assert told[what][0] == "StoreLimitError"
        assert told[what][1].endswith(f"cannot be changed: its file system is mounted read-only; {READ}")
    assert told["ro read"] == ["done", "4"]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as made:
        for number in range(6):
            made.put(f"a{number % 2}", contents(number))
        yield made


def fails(kind: str) -> sqlite3.OperationalError:
    """What SQLite gives, by the name of its code."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode, error.sqlite_errorname = getattr(sqlite3, kind), kind
    return error


@pytest.mark.parametrize(
    ("kind", "free", "expected"),
    [
        ("SQLITE_FULL", 10**9, StoreFullError),  # of a quota, say
        ("SQLITE_IOERR_WRITE", 0, StoreFullError),
        ("SQLITE_IOERR_SHMSIZE", 0, StoreFullError),
        ("SQLITE_CANTOPEN", 0, StoreFullError),
        ("SQLITE_IOERR_WRITE", 10**9, StoreError),
        ("SQLITE_CORRUPT", 0, StoreError),
    ],
)
def test_what_sqlite_says_of_a_full_disk(
    store: Any, monkeypatch: pytest.MonkeyPatch, kind: str, free: int, expected: type[StoreError]
) -> None:
    monkeypatch.setattr(sqlite, "_free", lambda path: free)
    with pytest.raises(StoreError) as caught, store._guarded():
        raise fails(kind)
    assert type(caught.value) is expected
    assert (FULL in str(caught.value)) == (expected is StoreFullError)


def test_how_far_a_longer_change_came_is_told(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_module, "PAGE", 1)
    own, calls = sqlite.SqliteStore._changing, iter([False, True])

    def changing(self: Any, work: Any) -> Any:
        if next(calls):
            raise StoreFullError("the disk is full")
        return own(self, work)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite.SqliteStore, "_changing", changing)
        with pytest.raises(StoreFullError, match=r"^the disk is full \(2 versions were removed before that\)$"):
            store.gc(keep=1)
    assert store.stats().versions == 4

    def full(self: Any) -> None:
        raise StoreFullError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(sqlite.SqliteStore, "_compact", full)
        with pytest.raises(StoreFullError, match=r"\(what was to be removed is removed, .* only compacting failed\)$"):
            store.gc(keep=1, compact=True)
    assert store.stats().versions == 2


def test_reading_is_no_reason_for_an_error_when_a_store_is_closed(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise StoreFullError("the disk is full")

    store.get("a1")
    monkeypatch.setattr(sqlite.SqliteStore, "_write", full)
    with pytest.raises(StoreFullError):
        store.flush()
    assert store._notes, "they can be written later"
    store.close()


@pytest.mark.parametrize("mode", ["file", "folder"])
def test_what_this_user_may_not_write(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'a.db'}"
    with open_store(url) as made:
        made.put("ann", contents(1))
    path = tmp_path / "a.db" if mode == "file" else tmp_path
    monkeypatch.setattr(os, "access", lambda place, how: Path(place) != path)  # root may write anywhere
    with open_store(url) as store:
        with (
            pytest.raises(
                StoreLimitError, match="cannot be changed: this user may not write (to the file|into)"
            ) as told,
            store._guarded(),
        ):  # type: ignore[attr-defined]
            raise fails("SQLITE_READONLY")
        assert str(told.value).endswith(READ)
