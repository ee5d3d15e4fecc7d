"""One client who means harm, or has gone wrong, takes neither time nor memory from the others."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel, ValidationError

from kilotune.errors import StoreError
from kilotune.fleet import open_store
from kilotune.serve.http import keys as keys_module
from kilotune.serve.http import prompts as prompts_module
from kilotune.serve.http.connections import MAX_HEAD
from kilotune.serve.http.keys import Keyring, add_key
from kilotune.serve.http.prompts import LONG, Prompts
from kilotune.serve.http.schemas import ChatBody, CompletionBody, EmbeddingBody
from tests.serve.http.test_http_errors import GOOD, error
from tests.serve.http.test_leaving_clients import Monitor, slow_base
from tests.serve.http.test_process import keys as keys_of
from tests.serve.http.test_process import process
from tests.support.http_support import Running, adapter_folder, prompt_ids, serving, tokenizer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("serve"), max_requests_per_tenant=2) as made:
        yield made


# -- long texts --------------------------------------------------------------------------------------

TEXT = "a" * (LONG + 1)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Reading a long text takes 50 ms, and fails where another one is being read; what was read."""
    own, read, busy = prompts_module._ids, list[str](), threading.Lock()

    def ids(tokenizer: Any, text: str, special: bool) -> Any:
        if len(text) > LONG:
            assert busy.acquire(blocking=False), "two at once in one tokenizer"
            time.sleep(0.05)
            busy.release()
            read.append(text[-1])
        return own(tokenizer, text[-1], special)

    monkeypatch.setattr(prompts_module, "_ids", ids)
    return read


def test_nobodys_long_texts_keep_others_waiting(slow: list[str]) -> None:
    prompts = Prompts(tokenizer(), 96)

    async def all_of_them() -> float:
        anns = [asyncio.create_task(prompts.plain(TEXT + "a", "prompt", "ann")) for _ in range(6)]
        await asyncio.sleep(0.01)
        bob = asyncio.create_task(prompts.plain(TEXT + "b", "prompt", "bob"))
        await asyncio.sleep(0)
        began = time.monotonic()
        assert list(await prompts.plain("t", "prompt", "bob")) == prompt_ids("t")
        prompts.token(20)
        short = time.monotonic() - began
        await asyncio.gather(bob, *anns)
        return short

    assert asyncio.run(all_of_them()) < 0.04, "a short text, or a token's text, waits for no long one"
    assert "b" in slow[:3], "and a long one of another tenant for two at most"


def test_who_goes_away_leaves_the_tokenizer_to_nobody_too_early(slow: list[str]) -> None:
    prompts = Prompts(tokenizer(), 96)

    async def leave_and_ask() -> None:
        for _ in range(3):
            task = asyncio.create_task(prompts.plain(TEXT + "a", "prompt", "ann"))
            await asyncio.sleep(0.01)
            task.cancel()
        await prompts.plain(TEXT + "b", "prompt", "bob")

    asyncio.run(leave_and_ask())
    assert slow[-1] == "b"
    assert not prompts._turns, "nothing is kept of who was here"


def test_a_text_that_is_read_takes_its_place(running: Running, slow: list[str]) -> None:
    statuses: list[int] = []

    def ask() -> None:
        with running.client(running.keys["ann"]) as ann:
            statuses.append(ann.post("/v1/completions", json={**GOOD, "prompt": TEXT}).status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 429 in statuses, statuses
    assert 200 in statuses, statuses
    assert running.service.gate.count == 0


# -- long prompts ------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_tenant_that_sends_long_prompts_without_a_pause_keeps_no_short_one_waiting(tmp_path: Path) -> None:
    """Against a process; counted in steps. https://github.com/vllm-project/vllm/issues/10774"""
    base = slow_base(tmp_path / "base", "generate")
    path, tenants, manager = keys_of(tmp_path, "ann", "bob")
    more = ("--name", "base", "--keys", str(path), "--set", "batch_tokens=128")
    with process(base, base / "adapters.db", tmp_path, *more) as served:
        metrics, done, statuses = Monitor(served.url, manager), threading.Event(), list[int]()

        def ask(space: str, prompt: list[int]) -> None:
            headers = {"Authorization": f"Bearer {tenants[space]}"}
            body = {"model": "base" if space == "bob" else "a1", "prompt": prompt, "max_tokens": 1}
            got = httpx2.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=120)
            statuses.append(got.status_code)

        def flood(seed: int) -> None:
            chance = random.Random(seed)
            while not done.is_set():
                ask("ann", [chance.randrange(7, 96) for _ in range(1000)])  # 8 steps

        threads = [threading.Thread(target=flood, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        taken = []
        for i in range(6):
            time.sleep(0.1)
            before = metrics("steps")[0]
            ask("bob", [10 + i] * 8)
            taken.append(metrics("steps")[0] - before)
        done.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert sorted(taken)[4] <= 5, taken  # the metrics are read some steps before and after


# -- floods of faults --------------------------------------------------------------------------------

MANY = 20_000
FLOODS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (CompletionBody, {**GOOD, "prompt": [True] * MANY}),
    (CompletionBody, {**GOOD, "prompt": [1] * MANY + ["x"]}),
    (CompletionBody, {**GOOD, "prompt": [[]] * MANY}),
    (CompletionBody, {**GOOD, "prompt": [[-1] * MANY]}),
    (CompletionBody, {**GOOD, "stop": [1] * MANY}),
    (CompletionBody, {**GOOD, **{f"x{i}": 1 for i in range(MANY)}}),
    (CompletionBody, {**GOOD, "stream": True, "stream_options": {f"x{i}": 1 for i in range(MANY)}}),
    (EmbeddingBody, {"model": "m", "input": [-1] * MANY}),
    (ChatBody, {"model": "m", "messages": [1] * MANY}),
    (ChatBody, {"model": "m", "messages": [{f"x{i}": 1 for i in range(90)}] * 4000}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": [1] * MANY}]}),
]


@pytest.mark.parametrize(("kind", "body"), FLOODS, ids=lambda value: str(value)[-40:])
def test_a_body_of_faults_makes_few_errors(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """Each takes about 15 microseconds of everybody's loop: a body has room for a million."""
    with pytest.raises(ValidationError) as told:
        kind.model_validate(body)
    assert told.value.error_count() <= 200


def test_a_flood_of_options_is_one_error(running: Running) -> None:
    with running.client(running.keys["ann"]) as ann:
        answer = ann.post("/v1/completions", json={**GOOD, **{f"x{i}": 1 for i in range(MANY)}})
        assert f"an object with {MANY + len(GOOD)} options" in error(answer, 400)["message"]


# -- the wire ----------------------------------------------------------------------------------------


def raw(running: Running, pieces: Callable[[], Iterator[bytes]]) -> tuple[int, bytes]:
    """(bytes that were taken, what was answered)."""
    sent, got = 0, b""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            for piece in pieces():
                connection.sendall(piece)
                sent += len(piece)
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65536):
                got += piece
    return sent, got


def headers() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\nHost: x\r\n"
    for number in range(2000):
        yield b"X-%d: " % number + b"a" * 8192 + b"\r\n"
        time.sleep(0.001)


def one_header() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\nHost: x\r\nX: "
    for _ in range(2000):
        yield b"a" * 8192
        time.sleep(0.001)


def trailers() -> Iterator[bytes]:
    yield b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    for number in range(2000):
        yield b"X-%d: " % number + b"a" * 8192 + b"\r\n"
        time.sleep(0.001)


@pytest.mark.parametrize("pieces", [headers, one_header, trailers])
def test_headers_without_an_end_are_not_kept(running: Running, pieces: Callable[[], Iterator[bytes]]) -> None:
    """Of whoever sends them, with a key or without."""
    sent, _ = raw(running, pieces)
    assert sent < 100 * MAX_HEAD, "the connection is closed"
    assert httpx2.get(f"{running.url}/health").status_code == 200


def test_headers_that_are_too_large_are_told() -> None:
    """Where the client reads before it sends on."""
    from types import SimpleNamespace

    from kilotune.serve.http.connections import Wire

    written: list[bytes] = []
    transport: Any = SimpleNamespace(write=written.append, close=lambda: None, is_closing=lambda: bool(written))
    wire = Wire.__new__(Wire)
    wire.transport = transport
    wire.parser = SimpleNamespace(feed_data=lambda data: None)  # type: ignore[assignment]
    wire.timeout_keep_alive_task = None
    for _ in range(9):
        wire.data_received(b"a" * 8192)
    assert len(written) == 1
    assert written[0].startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert json.loads(written[0].partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"


def test_large_bodies_and_many_requests_on_one_connection_are_no_headers(running: Running) -> None:
    with running.client(running.keys["ann"]) as ann:
        for _ in range(3):
            body = {**GOOD, "user": None, "prompt": "x" * 300_000}
            assert "takes 64 tokens" in error(ann.post("/v1/completions", json=body), 400)["message"]
        for _ in range(100):
            assert ann.get("/v1/models", headers={"x": "a" * 4000}).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"FOO /health HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_in_the_shape_of_all_errors(running: Running, sent: bytes) -> None:
    head, _, body = raw(running, lambda: iter([sent]))[1].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_a_websocket_is_not_opened_and_is_no_failure(running: Running) -> None:
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "eA==",
    }
    assert httpx2.get(f"{running.url}/health", headers=upgrade).status_code == 200


# -- keys --------------------------------------------------------------------------------------------


def test_a_file_of_keys_that_is_back_as_it_was_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "LOOK", 0.0)
    path, aside = tmp_path / "keys.json", tmp_path / "aside"
    key, _ = add_key(path, "tenant", "ann")
    ring = Keyring(path)
    os.rename(path, aside)
    assert ring.find(key) is not None
    assert "there is no file of keys" in str(ring.trouble)
    os.rename(aside, path)
    assert ring.find(key) is not None
    assert ring.trouble is None


@pytest.mark.parametrize(
    "change", [{"id": []}, {"id": 5}, {"note": {}}, {"created": None}, {"role": []}, {"namespace": 5}]
)
def test_a_file_of_keys_with_values_of_another_kind_leaves_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(keys_module, "LOOK", 0.0)
    path = tmp_path / "keys.json"
    key, _ = add_key(path, "tenant", "ann")
    ring = Keyring(path)
    document = json.loads(path.read_text())
    document["keys"].append({**document["keys"][0], "id": "other", **change})
    path.write_text(json.dumps(document))
    assert ring.find(key) is not None
    assert "is no file of keys" in str(ring.trouble)


# -- the store ---------------------------------------------------------------------------------------


def test_nothing_is_acknowledged_into_a_store_that_was_taken_away_or_replaced(tmp_path: Path) -> None:
    path, aside = tmp_path / "adapters.db", tmp_path / "aside.db"
    with open_store(f"sqlite:///{path}", namespace="ann") as store:
        store.put("before", adapter_folder(1))
        os.rename(path, aside)
        for what in ("is not there any more", "was replaced by another file"):
            with pytest.raises(StoreError, match=what):
                store.put("lost", adapter_folder(2))
            with pytest.raises(StoreError, match=what):
                store.info("before")
            path.write_bytes(b"")
        os.rename(aside, path)
        store.put("after", adapter_folder(2))
        assert [one.name for one in store.ls()] == ["after", "before"]
