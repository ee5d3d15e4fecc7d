"""Threads, processes and forks that write and read one store at the same time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kilotune.errors import AdapterError, StoreError
from kilotune.fleet.store import AdapterStore, Contents, Item, open_store, stacks
from kilotune.fleet.store.preparing import Below
from kilotune.fleet.store.schema import Link
from kilotune.fleet.store.sqlite import SqliteStore
from tests.support.store_support import CONFIG, KEYS, KINDS, contents, new_url

# Python 3.12 warns of any fork beside threads; a child here only uses the store.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
WORKERS = 4
EACH = 25


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_url(request.param, request, tmp_path)


def uniform(number: int) -> Contents:
    """All of its numbers are ``number``, so that half of one and half of another would be seen."""
    tensors = {key: torch.full((size,), float(number)) for key, size in KEYS.items()}
    return Contents(CONFIG, tensors, {"format": "pt"})


def run_all(works: list[Callable[[], None]]) -> None:
    """Run in threads; the first failure of any is raised."""
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def check_reads(store: AdapterStore, name: str, last: dict[str, int]) -> None:
    """What a reader sees is whole, belongs to its version, and an alias that only goes forward never goes back."""
    for which in ("live", None):
        record = store.get(name, which)
        numbers = set(record.vector().tolist())
        assert numbers == {float(record.info.metadata["number"])}, numbers
        key = f"{name} {which}"
        assert record.info.version >= last.get(key, 0)
        last[key] = record.info.version


def test_threads_share_a_handle(url: str) -> None:
    with open_store(url) as store:
        for name in ("a", "b"):
            store.put(name, uniform(0), metadata={"number": 0}, alias="live")
        done = threading.Event()

        def write(worker: int) -> None:
            for i in range(EACH):
                number = worker * 1000 + i
                store.put("ab"[i % 2], uniform(number), metadata={"number": number}, alias="live")

        def read() -> None:
            last: dict[str, int] = {}
            while not done.is_set():
                for name in ("a", "b"):
                    check_reads(store, name, last)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            run_all([lambda worker=worker: write(worker) for worker in range(WORKERS)])
        finally:
            done.set()
            for reader in readers:
                reader.join()
        check_complete(store)


def check_complete(store: AdapterStore) -> None:
    """Every write is there once, and the numbers of the versions have no gap."""
    found = [info for name in ("a", "b") for info in store.versions(name)]
    wanted = sorted([0, 0, *(worker * 1000 + i for worker in range(WORKERS) for i in range(EACH))])
    assert sorted(info.metadata["number"] for info in found) == wanted
    for name in ("a", "b"):
        versions = [info.version for info in store.versions(name)]
        assert versions == list(range(1, len(versions) + 1))
        assert store.aliases(name) == {"live": len(versions)}
    assert list(store.verify()) == []


def test_of_many_who_put_the_same_one_makes_the_version(url: str) -> None:
    """Handles of their own, as replicas have; beside others who put something else under the name."""
    stores = [open_store(url) for _ in range(WORKERS)]
    try:
        for i in range(EACH):
            made: list[tuple[int, bool]] = []

            def put(store: AdapterStore, number: int = i, made: list[tuple[int, bool]] = made) -> None:
                info, new = store.put_once("a", uniform(number), metadata={"number": number})
                made.append((info.version, new))

            run_all([lambda store=store: put(store) for store in stores * 2])  # type: ignore[misc]
            assert sorted(made) == [(i + 1, False)] * (2 * WORKERS - 1) + [(i + 1, True)]
        versions = stores[0].versions("a")
        assert [info.metadata["number"] for info in versions] == list(range(EACH))
    finally:
        for store in stores:
            store.close()


def test_processes_share_a_store(url: str) -> None:
    with open_store(url) as store:
        for name in ("a", "b"):
            store.put(name, uniform(0), metadata={"number": 0}, alias="live")

    def write(worker: int) -> None:
        with open_store(url) as own:
            for i in range(EACH):
                number = worker * 1000 + i
                own.put("ab"[i % 2], uniform(number), metadata={"number": number}, alias="live")

    children = [forked(lambda worker=worker: write(worker)) for worker in range(WORKERS)]
    last: dict[str, int] = {}
    with open_store(url, read_only=True) as reader:
        end = time.monotonic() + 120
        while (left := [child for child in children if not ended(child)]) and time.monotonic() < end:
            children = left
            check_reads(reader, "a", last)
    with open_store(url) as store:
        check_complete(store)


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child: int) -> bool:
    number, status = os.waitpid(child, os.WNOHANG)
    if number:
        assert os.waitstatus_to_exitcode(status) == 0, "a child failed"
    return bool(number)


def wait(child: int) -> None:
    end = time.monotonic() + 60
    while not ended(child):
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_handle_lives_on_in_a_fork_and_in_its_parent(url: str) -> None:
    with open_store(url) as store:
        store.put("a", contents(1))
        assert store.get("a").info.version == 1

        def work() -> None:
            assert store.get("a").info.version == 1
            store.put("a", contents(2))
            store.close()

        wait(forked(work))
        assert store.get("a").info.version == 2
        assert store.put("a", contents(3)).version == 3
        assert list(store.verify()) == []


def test_bulk_writers_of_the_same_names_do_not_block_each_other_for_ever(url: str) -> None:
    """In opposite orders, which is what deadlocks are made of."""
    names = [f"user-{i:03d}" for i in range(60)]

    def write(order: list[str]) -> None:
        with open_store(url) as own:
            for _ in range(3):
                own.put_many((Item(name, uniform(1)) for name in order), batch=20, alias="live")
                own.roll_out("live", dict.fromkeys(order))
                own.gc(keep=2)

    open_store(url).close()
    run_all([lambda: write(names), lambda: write(names[::-1]), lambda: write(names[30:] + names[:30])])
    with open_store(url) as store:
        assert [len(store.versions(name)) for name in names] == [2] * 60
        assert {store.aliases(name)["live"] for name in names} == {9}
        assert list(store.verify()) == []


def test_handles_of_one_file_take_turns_in_a_process(tmp_path: Path) -> None:
    """SQLite by itself lets who finds another one writing sleep, for longer each time."""
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url) as first, open_store(url, namespace="ben") as second:
        assert isinstance(first, SqliteStore)
        assert isinstance(second, SqliteStore)
        waits = threading.Event()
        order: list[str] = []

        def long(link: Link) -> None:
            waits.wait(20)
            order.append("first")

        def short(link: Link) -> None:
            order.append("second")

        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(first._write, long)]
            while not first._writing.locked():
                pass
            asked.append(pool.submit(second._write, short))
            assert second._writing is first._writing
            assert order == []
            waits.set()
            for one in asked:
                one.result(timeout=20)
        assert order == ["first", "second"]
    with open_store(f"sqlite:///{tmp_path}/b.db") as other:
        assert isinstance(other, SqliteStore)
        assert other._writing is not first._writing


def test_who_waits_too_long_is_told(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url) as one, open_store(url, timeout=0.1) as other:
        one.put("a", contents(1))

        def work(link: object) -> None:
            with pytest.raises(StoreError, match="others have written to it for 0.1 seconds on end"):
                other.put("a", contents(2))
            assert other.get("a").info.version == 1  # readers do not wait

        one._write(work)  # type: ignore[attr-defined]
        assert other.put("a", contents(3)).version == 2


def test_many_processes_make_one_store(url: str) -> None:
    children = [forked(lambda i=i: open_store(url, namespace=f"n{i}").put("a", contents(i)) and None) for i in range(6)]
    for child in children:
        wait(child)
    for i in range(6):
        with open_store(url, namespace=f"n{i}") as store:
            assert list(store.names()) == ["a"]
            assert list(store.verify()) == []


@pytest.mark.heavy
def test_gc_of_forms_does_not_take_what_is_being_used(url: str) -> None:
    """One puts adapters of ever new forms and removes them, another collects all the time."""
    done = threading.Event()

    def collect() -> None:
        with open_store(url) as own:
            while not done.is_set():
                own.gc()

    def write(worker: int) -> None:
        with open_store(url, namespace=f"n{worker}") as own:
            for i in range(12):
                config = {**CONFIG, "base_model_name_or_path": f"base-{i % 3}"}
                own.put("a", contents(i, config))
                assert own.get("a").config == config
                own.rm("a")

    open_store(url).close()
    collector = threading.Thread(target=collect)
    collector.start()
    try:
        run_all([lambda worker=worker: write(worker) for worker in range(2)])
    finally:
        done.set()
        collector.join()


def test_a_fork_in_the_middle_of_a_threads_write(url: str) -> None:
    """The child has no such thread, so it must not wait for it, and nothing of SQLite's must be half done in it."""
    with open_store(url, timeout=20) as store:
        store.put("a", contents(1))
        stop = threading.Event()

        def busy() -> None:
            while not stop.is_set():
                store.put("a", contents(3))
                store.get("a")

        threads = [threading.Thread(target=busy) for _ in range(2)]
        for thread in threads:
            thread.start()

        def work(number: int) -> None:
            assert store.get("a").info.version >= 1
            with open_store(url, timeout=20) as another:
                another.put(f"child-{number}", contents(2))
            store.put(f"child-{number}", contents(3))
            store.close()

        try:
            children = [forked(lambda number=number: work(number)) for number in range(5)]
            for child in children:
                wait(child)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert list(store.names()) == ["a", *(f"child-{number}" for number in range(5))]
        assert list(store.verify()) == []


@pytest.mark.heavy
def test_nobody_is_put_on_what_goes_at_the_same_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some put personal adapters on a shared one whose versions another one puts and removes meanwhile."""
    hold = stacks.hold

    def slow(link: Link, places: Iterable[Below]) -> None:
        hold(link, places)
        time.sleep(0.02)  # the version was there; it must be when this is on disk

    with open_store(url) as store:
        store.put("style", uniform(0))
        monkeypatch.setattr(stacks, "hold", slow)
        put, refused = list[int](), list[str]()

        def personal(worker: int) -> None:
            for number in range(EACH):
                try:
                    put.append(store.put(f"p{worker}-{number}", uniform(number), on="style").version)
                except AdapterError as error:
                    refused.append(str(error))

        def shared() -> None:
            for number in range(EACH):
                made = store.put("style", uniform(number))
                try:
                    store.rm("style", made.version - 1)
                except AdapterError as error:
                    refused.append(str(error))

        run_all([*(lambda worker=worker: personal(worker) for worker in range(WORKERS)), shared])  # type: ignore[misc]
        assert list(store.verify()) == [], "who stands on something has it"
        assert put
        told = ("would answer no more", "removed meanwhile", "has no version")
        assert all(any(words in text for words in told) for text in refused), refused
