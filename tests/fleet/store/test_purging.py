"""Adapters that go for good: the numbers and the name are in no file of the store any more."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from kilotune.errors import AdapterError, StoreError, UnsupportedError
from kilotune.fleet.store import AdapterStore, open_store
from kilotune.fleet.store.documents import Documents
from kilotune.fleet.store.purging import purge
from kilotune.fleet.store.sqlite import SqliteStore
from tests.support.store_support import Opener, bits, contents, lora


@pytest.fixture
def store(opened: Opener) -> AdapterStore:
    return opened()


def held(path: Path, *needles: bytes) -> list[bytes]:
    """Which of these are in a file beside ``path``, or in it."""
    data = [file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name)]
    return [needle for needle in needles if any(needle in one for one in data)]


def numbers(seed: int) -> bytes:
    """Some of the numbers of such an adapter, as they lie in a row."""
    tensors = contents(seed).tensors
    return bits(tensors[sorted(tensors)[0]])


def test_every_version_and_the_name_go_and_all_else_stays(store: AdapterStore) -> None:
    for seed in (1, 2):
        store.put("ann", contents(seed), alias="live", tags=["t"], metadata={"word": "secret"})
    store.put("ben", contents(3), alias="live")
    assert purge(store, ["ann", "nobody"]) == 2
    assert [version.name for version in store.ls()] == ["ben"]
    assert list(store.names()) == ["ben"]
    with pytest.raises(AdapterError, match="there is no adapter 'ann'"):
        store.info("ann")
    assert store.put("ann", contents(4)).version == 1
    assert list(store.verify()) == []
    assert purge(store, ["ann"]) == 1
    assert purge(store, ["ann"]) == 0


def test_a_name_that_others_stand_on_goes_with_the_last_of_them(store: AdapterStore) -> None:
    store.put("house", lora(1))
    store.put("ann", contents(1), on="house")
    assert purge(store, ["house"]) == 1
    assert [version.name for version in store.ls()] == ["ann"]
    on = store.info("ann").stands_on
    assert on is not None
    assert on.removed
    assert purge(store, ["ann", "house"]) == 1
    assert list(store.names()) == []


def test_another_namespace_keeps_its_own(store: AdapterStore, opened: Opener) -> None:
    other = opened(namespace="other")
    for one in (store, other):
        one.put("ann", contents(1))
    purge(store, ["ann"])
    assert [version.name for version in other.ls()] == ["ann"]


def test_nothing_of_it_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "adapters.db"
    with open_store(f"sqlite:///{path}") as store:
        for seed in range(20):
            store.put(f"user-{seed}-name", contents(seed), metadata={"word": f"secret {seed}"}, tags=[f"tag-{seed}"])
        needles = [numbers(7), b"user-7-name", b"secret 7", b"tag-7"]
        assert held(path, *needles, numbers(8)) == [*needles, numbers(8)]
        purge(store, ["user-7-name"])
        assert held(path, *needles, numbers(8)) == [numbers(8)]


def test_what_was_written_over_is_not_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "adapters.db"
    with open_store(f"sqlite:///{path}") as store:
        documents = Documents(store, "ann")
        made = documents.add("note", {"text": "the first word, " * 4})
        documents.add("note", {"text": "another"})
        documents.change("note", made.name, lambda one: type(one)(**{**one.__dict__, "data": {"text": "no"}}))
        documents.rm("note", documents.add("note", {}).name)  # empties the log
        assert held(path, b"the first word", b"another") == [b"another"]


def test_without_it_the_test_finds_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = SqliteStore._connect

    def careless(store: SqliteStore) -> sqlite3.Connection:
        made = connect(store)
        made.execute("PRAGMA secure_delete = OFF")
        return made

    monkeypatch.setattr(SqliteStore, "_connect", careless)
    with pytest.raises(AssertionError):
        test_nothing_of_it_is_in_the_file(tmp_path)


def test_a_log_that_cannot_be_emptied_is_told(tmp_path: Path) -> None:
    path = tmp_path / "adapters.db"
    with open_store(f"sqlite:///{path}", timeout=0.1) as store:
        store.put("ann", contents(1))
        reader = sqlite3.connect(path, isolation_level=None)
        try:
            reader.execute("BEGIN")
            assert reader.execute("SELECT COUNT(*) FROM kilotune_versions").fetchone() == (1,)
            with pytest.raises(StoreError, match="is gone, but not from SQLite's log"):
                purge(store, ["ann"])
            assert list(store.ls()) == []
        finally:
            reader.close()
        purge(store, ["ann"])
        assert held(path, numbers(1)) == []


def test_folders_cannot(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, pytest.raises(UnsupportedError, match="needs SQLite or Postgre"):
        purge(store, ["ann"])
