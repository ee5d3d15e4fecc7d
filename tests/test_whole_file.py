"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kilotune import whole_file
from kilotune.whole_file import flush, hold, holder, let_go, replacing

WAYS = [{}, {"shared": True}, {"flushed": True}, {"shared": True, "flushed": True}]


def held(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def written(path: Path, way: dict[str, bool], error: BaseException) -> None:
    with replacing(path, **way) as fresh:
        fresh.write_text("ne")
        raise error


@pytest.mark.parametrize("way", WAYS)
def test_what_was_there_stays_until_the_end(tmp_path: Path, way: dict[str, bool]) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with replacing(path, **way) as fresh:
        assert fresh.parent == tmp_path  # of the same file system
        assert fresh.name.startswith(".")
        fresh.write_text("new")
        assert path.read_text() == "old"
    assert held(tmp_path) == {"a": "new"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there_and_nothing_beside_it(
    tmp_path: Path, way: dict[str, bool], error: BaseException
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(type(error)):
        written(path, way, error)
    assert held(tmp_path) == {"a": "old"}


def test_a_rename_that_fails_says_why_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise PermissionError("no renaming here")

    monkeypatch.setattr(os, "replace", fails)
    monkeypatch.setattr(os, "unlink", fails)  # what cannot be taken away hides nothing
    with pytest.raises(PermissionError, match="no renaming"), replacing(tmp_path / "a") as fresh:
        fresh.write_text("new")
    assert not (tmp_path / "a").exists()


def test_several_at_once_write_to_names_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with replacing(path, shared=True) as one, replacing(path, shared=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert held(tmp_path) == {"a": "one"}  # the last that ended


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as left:
        left.write_text("first")
    left.write_text("left by a kill")
    with replacing(tmp_path / "a") as fresh:
        assert fresh == left
        fresh.write_text("second")
    assert held(tmp_path) == {"a": "second"}


def test_flushed_is_the_file_before_its_name_and_then_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if os.path.samestat(os.fstat(handle), tmp_path.stat()) else "file")
        sync(handle)

    def replaced(*args: Any) -> None:
        done.append("name")
        replace(*args)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with replacing(tmp_path / "a", flushed=True) as fresh:
        fresh.write_text("new")
    assert done == ["file", "name", "folder"]
    flush(tmp_path / "a")
    assert done[3:] == ["file"]


# -- one process at a time -----------------------------------------------------------------------------


def test_one_holds_a_file_until_it_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = hold(path)
    assert held is not None
    assert holder(path).startswith(f"process {os.getpid()} on ")
    assert hold(path) is None
    let_go(held, path)
    assert not path.exists()
    path.write_text("left by a kill")
    again = hold(path)
    assert again is not None
    again.close()
    assert path.exists()
    assert holder(tmp_path / "none") == "another process"


def test_who_waits_gets_the_file_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened while another held it, and taken away by that one before it was locked: nobody else would see it."""
    path, lock = tmp_path / "lock", whole_file._lock

    def late(file: Any) -> bool:
        if path.exists() and not path.stat().st_size:
            path.unlink()
            path.write_text("another's")
        return lock(file)

    monkeypatch.setattr(whole_file, "_lock", late)
    held = hold(path)
    assert held is not None
    monkeypatch.undo()
    assert hold(path) is None
    held.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = hold(path)
    assert held is not None
    (reading, writing), (waiting, ready) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:  # lives until the parent says so
        os.write(ready, b"x")
        os.read(reading, 1)
        os._exit(0)
    try:
        os.read(waiting, 1)
        held.close()  # as at the parent's death: its own handle goes, and nothing is unlocked
        again = hold(path)
        assert again is not None
        again.close()
    finally:
        os.write(writing, b"x")
        os.waitpid(child, 0)
        for end in (reading, writing, waiting, ready):
            os.close(end)
