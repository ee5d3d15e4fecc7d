"""Puts: how many at once, that answers never wait for them, and that what is told of one is so."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kilotune.errors import CheckpointError, ResourceError, StoreError
from kilotune.serve.engine.interface import AdapterKey, EngineError
from kilotune.serve.http import puts
from kilotune.serve.http.keys import Keyring, new_key
from tests.serve.http.test_http_errors import GOOD, error
from tests.serve.http.test_management_routes import files_of, put, wait_for
from tests.support.http_support import Running, StoreCatalogue, adapter_folder, batching, expected, keyring, serving


@contextmanager
def held(running: Running, step: str) -> Iterator[threading.Event]:
    """Every put stops at this step of the catalogue until the event is set."""
    go, own = threading.Event(), getattr(running.catalogue, step)

    def slow(*given: Any, **more: Any) -> Any:
        assert go.wait(30)
        return own(*given, **more)

    setattr(running.catalogue, step, slow)
    try:
        yield go
    finally:
        go.set()
        setattr(running.catalogue, step, own)


def in_threads(calls: list[Callable[[], httpx2.Response]]) -> tuple[list[threading.Thread], list[httpx2.Response]]:
    answers: list[httpx2.Response] = []
    threads = [threading.Thread(target=lambda call=call: answers.append(call())) for call in calls]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    return threads, answers


@pytest.fixture(autouse=True)
def _made() -> None:
    adapter_folder(4)  # by one thread


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path, catalogue=StoreCatalogue(f"sqlite:///{tmp_path / 'adapters.db'}")) as made:
        yield made


@pytest.fixture
def manager(running: Running) -> Iterator[httpx2.Client]:
    with running.client(running.manager) as client:
        yield client


def names(manager: httpx2.Client, space: str = "ann") -> list[str]:
    return [one["name"] for one in manager.get(f"/manage/{space}/adapters").json()["adapters"]]


# -- how many at once --------------------------------------------------------------------------------


def test_many_puts_of_one_namespace_hold_nobody_up(tmp_path: Path) -> None:
    """48 at once; before, they took the threads in which everybody's names are looked up."""
    with (
        serving(tmp_path, max_puts=64, max_puts_per_tenant=40) as running,
        running.client(running.manager) as manager,
        running.client(running.keys["bob"]) as bob,
    ):
        with held(running, "check") as go:
            calls = [lambda i=i: put(manager, f"n{i}", 4) for i in range(48)]
            threads, answers = in_threads(calls)
            wait_for(lambda: running.service.puts.count == 40 and len(answers) == 8)
            for _ in range(5):
                began = time.monotonic()
                answer = bob.post("/v1/completions", json={**GOOD, "model": "secret-plans"})
                assert answer.json()["choices"][0]["text"] == expected(3, GOOD["prompt"], GOOD["max_tokens"])
                assert time.monotonic() - began < 5
            assert manager.get("/manage/ann/adapters").status_code == 200, "nor the rest of this namespace"
            assert manager.get("/manage").json()["puts"] == 40
            other, told = in_threads([lambda: put(manager, "own", 4, space="bob")])
            go.set()
            for thread in [*threads, *other]:
                thread.join(30)
        assert told[0].status_code == 201
        refused = [answer for answer in answers if answer.status_code == 429]
        assert (len(refused), sum(answer.status_code == 201 for answer in answers)) == (8, 40)
        assert "you have 40 puts running or waiting, and may have 40" in error(refused[0], 429)["message"]
        assert int(refused[0].headers["retry-after"]) >= 1
        assert running.service.puts.count == 0


def test_puts_of_one_namespace_are_at_work_one_by_one(running: Running, manager: httpx2.Client) -> None:
    inside, most = list[int](), list[int]()
    own = running.catalogue.check

    def counted(*given: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return own(*given)

    running.catalogue.check = counted  # type: ignore[method-assign]
    threads, answers = in_threads([lambda i=i: put(manager, f"n{i}", 4) for i in range(8)])  # type: ignore[misc]
    for thread in threads:
        thread.join(30)
    assert [answer.status_code for answer in answers] == [201] * 8
    assert max(most) == 1


def test_what_is_refused_is_refused_before_its_files_are_taken_in(tmp_path: Path) -> None:
    with serving(tmp_path, max_puts_per_tenant=1, max_adapter=64 * 2**20) as running:
        with running.client(running.manager) as manager, held(running, "check") as go:
            threads, answers = in_threads([lambda: put(manager, "first", 4)])
            wait_for(lambda: running.service.puts.count == 1)
            began = time.monotonic()
            files = {**files_of(adapter_folder(4)), "weights": ("w", bytes(48 * 2**20))}
            assert "1 puts" in error(manager.put("/manage/ann/adapters/second", files=files), 429)["message"]
            assert time.monotonic() - began < 10
            go.set()
            threads[0].join(30)
        assert answers[0].status_code == 201


def test_a_namespace_has_only_its_own_places(tmp_path: Path) -> None:
    """A manager of bob's cannot take ann's places by asking for what he may not do."""
    (bobs, kept), (ring, tenants, key, monitor) = new_key("manager", "bob"), keyring("ann", "bob", "carl")
    whole = (Keyring(None, [*ring._fixed, kept]), tenants, key, monitor)
    with (
        serving(tmp_path, ring=whole, max_puts_per_tenant=1, max_puts=2) as running,
        running.client(running.manager) as manager,
        running.client(bobs) as bob,
    ):
        with held(running, "check") as go:
            threads, answers = in_threads([lambda: put(bob, "own", 4, space="bob")])
            wait_for(lambda: running.service.puts.count == 1)
            assert put(bob, "theirs", 4, space="ann").status_code == 429, "his own place is taken, none of ann's"
            more, others = in_threads([lambda: put(manager, "hers", 4, space="ann")])
            wait_for(lambda: running.service.puts.count == 2)
            go.set()
            for thread in [*threads, *more]:
                thread.join(30)
        assert [answers[0].status_code, others[0].status_code] == [201, 201]
        assert put(bob, "theirs", 4, space="ann").status_code == 403


def test_who_goes_away_gives_the_place_back(running: Running, manager: httpx2.Client) -> None:
    with held(running, "check") as go:
        with pytest.raises(httpx2.ReadTimeout):
            manager.put("/manage/ann/adapters/gone", files=files_of(adapter_folder(4)), timeout=0.3)
        wait_for(lambda: running.service.puts.count == 0)
        go.set()
    assert put(manager, "next", 4).status_code == 201
    assert "gone" not in names(manager), "nobody waits for it, so it is not stored"


# -- what is told is so ------------------------------------------------------------------------------


def test_an_engine_without_time_to_try_an_adapter_is_no_store_that_does_not_answer(
    running: Running, manager: httpx2.Client
) -> None:
    def check(*_: Any) -> Any:
        raise ResourceError("the engine did not come to try the adapter; try again later")

    running.catalogue.check = check  # type: ignore[method-assign]
    told = error(put(manager, "tried", 4), 503)
    assert (told["message"], told["code"]) == (
        "the engine did not come to try the adapter; try again later",
        "unavailable",
    )


def test_a_check_that_takes_too_long_stores_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, max_seconds=0.6) as running, running.client(running.manager) as manager:
        check_too_long(running, manager)


def check_too_long(running: Running, manager: httpx2.Client) -> None:
    with held(running, "check") as go:
        threads, late = in_threads([lambda: put(manager, "waits", 4)])
        answer = put(manager, "slow", 4)
        threads[0].join(30)
        told = {error(one, one.status_code)["message"] for one in (answer, *late)}
        assert {answer.status_code, late[0].status_code} == {503, 504}
        assert told == {
            "the adapter could not be checked within 0.6 s; nothing was stored; try again",
            "other puts of 'ann' have taken its turn for 0.6 s; nothing was stored; try again",
        }
        go.set()
    wait_for(lambda: not running.service.putting._taken)
    assert not {"slow", "waits"} & {*names(manager)}


def test_a_store_that_others_are_writing_to_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = batching(tmp_path)
    parts["catalogue"]._timeout = 0.2
    with serving(tmp_path, **parts) as running, running.client(running.manager) as manager:
        parts["catalogue"].close()  # handles with this patience are opened anew
        with sqlite3.connect(tmp_path / "adapters.db", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            for answer in (put(manager, "new", 4), manager.delete("/manage/ann/adapters/poems")):
                told = error(answer, 503)
                assert "is busy: others have written to it for 0.2 seconds on end" in told["message"]
                assert told["code"] == "store_unavailable"
                assert "adapters.db" not in told["message"]
            other.execute("ROLLBACK")
        other.close()
        assert put(manager, "new", 4).json()["version"] == 1


def test_a_store_that_does_not_come_to_an_end_is_told_as_unknown(
    running: Running, manager: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(puts, "KEEPING", 0.3)
    with held(running, "keep") as go:
        told = error(put(manager, "perhaps", 4), 503)
        assert "has not answered within 0.3 s: the adapter is stored or not; put it again" in told["message"]
        go.set()
    wait_for(lambda: "perhaps" in names(manager))
    answer = put(manager, "perhaps", 4)
    assert (answer.status_code, answer.json()["version"], answer.json()["created"]) == (200, 1, False)


# -- once more ---------------------------------------------------------------------------------------


def test_a_put_can_be_repeated(running: Running, manager: httpx2.Client) -> None:
    given = {"tags": ["eu", "beta"], "metadata": '{"rows": 12}', "alias": "live"}
    first = put(manager, "twice", 4, **given)
    assert (first.status_code, first.json()["created"], first.json()["ready"]) == (201, True, True)
    for _ in range(2):
        again = put(manager, "twice", 4, **given)
        assert again.status_code == 200
        assert again.json() == {**first.json(), "created": False}
    assert put(manager, "twice", 4, **given, space="bob").status_code == 201
    assert put(manager, "twice", 5, **given).json()["version"] == 2, "other files"
    assert put(manager, "twice", 4, **given).json()["version"] == 3, "the files that were newest before the last put"
    assert put(manager, "twice", 4, **{**given, "tags": ["eu"]}).json()["version"] == 4
    moved = put(manager, "twice", 4, tags=["eu"], metadata='{"rows": 12}', alias="beta")
    assert (moved.status_code, moved.json()["version"]) == (200, 4)
    shown = manager.get("/manage/ann/adapters/twice").json()["versions"]
    assert [(one["version"], one["aliases"]) for one in shown] == [(1, []), (2, []), (3, []), (4, ["beta", "live"])]
    assert shown[0]["created"] == first.json()["created_at"]


def test_what_is_stored_and_not_read_back_in_time_is_told_as_stored(
    running: Running, manager: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was 503, and who came again made a second version."""
    monkeypatch.setattr(puts, "PATIENCE", 0.2)
    with held(running, "load") as go:
        answer = put(manager, "slow", 4)
        assert (answer.status_code, answer.json()["created"], answer.json()["ready"]) == (201, True, False)
        told = "version 1 is stored, and is read when it is first asked for: it has not been read back within 0.2 s"
        assert answer.json()["note"] == told
        go.set()
    again = put(manager, "slow", 4)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert (again.json()["ready"], again.json()["note"]) == (True, None)


@pytest.mark.parametrize(
    ("fault", "part"),
    [
        (StoreError("/var/lib/adapters.db: disk I/O error"), "the store of adapters does not answer"),
        (CheckpointError("adapter 'lost', version 1 is damaged"), "is damaged"),
        (RuntimeError("internal detail"), "reading it back failed; the log says more"),
    ],
)
def test_what_is_stored_and_cannot_be_read_back_is_told_as_stored(
    running: Running, manager: httpx2.Client, fault: Exception, part: str
) -> None:
    def load(_: AdapterKey) -> None:
        raise fault

    running.catalogue.load = load  # type: ignore[method-assign]
    answer = put(manager, "lost", 4)
    assert (answer.status_code, answer.json()["version"], answer.json()["ready"]) == (201, 1, False)
    assert part in answer.json()["note"]
    assert "/var/lib" not in answer.text
    assert "internal detail" not in answer.text
    assert put(manager, "lost", 4).status_code == 200


def test_of_many_who_put_the_same_at_once_one_makes_the_version(running: Running, manager: httpx2.Client) -> None:
    """Two processes over one store are in test_process.py."""
    threads, answers = in_threads([lambda: put(manager, "raced", 4) for _ in range(12)])
    for thread in threads:
        thread.join(30)
    assert sorted(answer.status_code for answer in answers) == [200] * 11 + [201]
    assert {answer.json()["version"] for answer in answers} == {1}
    assert len(manager.get("/manage/ann/adapters/raced").json()["versions"]) == 1


def test_the_document_says_what_a_put_is_answered_with(running: Running) -> None:
    document = httpx2.get(f"{running.url}/openapi.json").json()
    answers = document["paths"]["/manage/{namespace}/adapters/{name}"]["put"]["responses"]
    for status in ("200", "201"):
        schema = answers[status]["content"]["application/json"]["schema"]
        assert schema["properties"]["created"]["type"] == "boolean"
        assert {"ready", "note", "version"} <= {*schema["required"]}
    assert "newest version" in answers["200"]["description"]


# -- what a store is ---------------------------------------------------------------------------------


def test_a_folder_is_only_read_which_is_told_at_once(tmp_path: Path) -> None:
    """And it is no store that is away, which one would wait for."""
    made = batching(tmp_path)
    folders = tmp_path / "folders"
    folders.mkdir()
    (folders / "ann").symlink_to(adapter_folder(1))
    with serving(tmp_path, **made) as running, running.client(running.manager) as manager:
        registry = made["catalogue"]
        registry.close()
        registry.url = str(folders)
        for answer in (
            put(manager, "new", 4, space="default"),
            manager.delete("/manage/default/adapters/ann"),
            manager.post("/manage/default/aliases/live", json={"versions": {"ann": 1}}),
        ):
            assert "is only read, so nothing can be put, moved or removed in it" in error(answer, 409)["message"]
        assert "has no tags" in error(manager.get("/manage/default/adapters?tag=x"), 409)["message"]
        assert registry.store_state() is None


def test_an_engine_that_has_ended_is_not_the_stores_fault(running: Running) -> None:
    def ended(_: AdapterKey) -> Any:
        raise EngineError("the engine does not take requests: CUDA error 700 on cuda:3")

    running.engine._adapter = ended
    with running.client(running.keys["ann"]) as ann:
        told = error(ann.post("/v1/completions", json=GOOD), 503)
    assert (told["message"], told["code"]) == ("the engine takes no requests; try again", "unavailable")
