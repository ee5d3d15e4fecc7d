"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kilotune.whole_file import flush, replacing

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
