"""Whoever goes away is worked for no longer, however and whenever that is."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch

from kilotune import VeraConfig, get_peft_model
from kilotune.fleet import open_store
from kilotune.serve.engine.lanes import Lanes
from kilotune.serve.http.connections import Wire
from kilotune.serve.http.process import listen
from kilotune.serve.http.service import Service
from kilotune.serve.http.settings import ServeSettings
from tests.serve.http.test_http_errors import GOOD
from tests.serve.http.test_process import keys, process
from tests.support.http_support import Running, serving
from tests.support.train_support import tokenizer


def post(key: str, path: str = "/v1/completions", **body: Any) -> bytes:
    """A request's bytes."""
    sent = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def wait_until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it does not come to that"
        time.sleep(0.005)


# -- the causes, one by one --------------------------------------------------------------------------


def test_going_away_in_the_moment_that_the_store_answers_is_not_lost() -> None:
    """https://github.com/python/cpython/issues/86296: Python 3.11's wait_for gives the result and forgets the rest."""
    answered = threading.Event()

    def call() -> int:
        answered.set()
        return 1

    async def ask() -> asyncio.Task[int]:
        lanes = Lanes("test", 1, 1)
        service: Any = SimpleNamespace(_asking=lanes)
        task = asyncio.create_task(Service.ask(service, "ann", call))
        await asyncio.sleep(0)  # it waits
        assert answered.wait(5)
        time.sleep(0.05)  # its answer is on the way to the loop
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.wait([task])
        lanes.close()
        return task

    assert asyncio.run(ask()).cancelled()


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Running]:
    with serving(tmp_path, delay=0.02) as made:
        yield made


def test_a_client_that_sends_another_request_ahead_and_goes_away_is_noticed(slow: Running) -> None:
    """A second request that came too early stopped the reading, and with it the noticing."""
    request = post(slow.keys["ann"], **{**GOOD, "max_tokens": 50, "ignore_eos": True})
    for sent in ([request + request], [request, request], [request, request[:300]], [request, b"GET"]):
        asked = len(slow.engine.asked)
        with connected(slow.url) as connection:
            for piece in sent:
                connection.sendall(piece)
                wait_until(lambda: len(slow.engine.asked) == asked + 1)  # noqa: B023
        wait_until(lambda: slow.engine.running == 0, 0.5)
        assert len(slow.engine.asked) == asked + 1
        wait_until(lambda: slow.service.gate.count == 0)


@pytest.mark.parametrize("together", [True, False])
def test_a_request_that_is_sent_ahead_is_not_answered_and_spoils_nothing(slow: Running, together: bool) -> None:
    request = post(slow.keys["ann"], **{**GOOD, "max_tokens": 8, "ignore_eos": True})
    asked = len(slow.engine.asked)
    with connected(slow.url) as connection:
        connection.sendall(request + request if together else request)
        if not together:
            wait_until(lambda: len(slow.engine.asked) == asked + 1)
            connection.sendall(request)
            connection.sendall(b"\0 and what is no HTTP at all")
        got = b""
        with contextlib.suppress(ConnectionError):  # what it had to say was not read
            while piece := connection.recv(65536):
                got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in head
    assert json.loads(body)["usage"]["completion_tokens"] == 8
    assert len(slow.engine.asked) == asked + 1


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "half"])
def test_a_client_that_takes_nothing_and_sends_no_more_is_gone_at_once(whole: bool) -> None:
    """Also where the connection cannot end before what was written to it is taken.

    https://github.com/Neroued/ninfer/issues/111
    """
    import uvicorn

    told = threading.Event()
    begun = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        await send({"type": "http.response.start", "status": 200, "headers": []})

        async def write() -> None:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 2**20, "more_body": True})
                await asyncio.sleep(0)

        writing = asyncio.create_task(write())
        begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        told.set()
        writing.cancel()

    listening = listen(ServeSettings(port=0))
    server = uvicorn.Server(
        uvicorn.Config(app, http=Wire, ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        with connected(f"http://127.0.0.1:{listening.getsockname()[1]}") as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert begun.wait(5)
            time.sleep(0.3)  # what is between both is full
            assert not told.is_set()
            if whole:
                connection.close()
            else:
                connection.shutdown(socket.SHUT_WR)
            assert told.wait(1)
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


# -- all of them at once, against a process ------------------------------------------------------------


def slow_base(folder: Path, kind: str) -> Path:
    """A model whose steps take a while, and four adapters of it in a store beside it."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "vocab_size": 96, "max_position_embeddings": 1024}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "generate" else BertModel(BertConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer(bert=kind == "embed").save_pretrained(folder)
    own = get_peft_model(model, VeraConfig(r=16, target_modules="all-linear"))
    with open_store(f"sqlite:///{folder}/adapters.db", namespace="ann") as store:
        for seed in range(4):
            chance = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for _, parameter in own.adapter_parameters():
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=chance))
            store.put(f"a{seed}", own)
    return folder


class Monitor:
    """What a service says of itself."""

    def __init__(self, url: str, key: str) -> None:
        self.url, self.headers = url, {"Authorization": f"Bearer {key}"}

    def __call__(self, *names: str) -> list[int]:
        text = httpx2.get(f"{self.url}/metrics", headers=self.headers, timeout=30).text
        return [
            int(float(re.findall(rf"^kilotune_engine_{name}(?:_total)? (\S+)", text, re.MULTILINE)[0]))
            for name in names
        ]


WAYS = ("at once", "reset", "half", "ahead", "soon", "reading")


def leave(url: str, request: bytes, way: str, chance: random.Random, kept: list[socket.socket]) -> None:
    """Ask, and go away."""
    connection = connected(url)
    connection.sendall(request * (2 if way == "ahead" else 1))
    if way == "soon":
        time.sleep(chance.uniform(0.0, 0.3))
    if way == "reading":
        connection.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            connection.recv(100)
    if way == "half":
        connection.shutdown(socket.SHUT_WR)
        kept.append(connection)
        return
    if way in ("reset", "soon"):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


LONG = "the cat " * 90
ASKED: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "generate": (
        "/v1/completions",
        {"prompt": "the cat sat", "max_tokens": 300, "ignore_eos": True},
        [{"stream": True}, {}, {"n": 3}, {"n": 3, "stream": True}, {"prompt": LONG}],
    ),
    "embed": ("/v1/embeddings", {}, [{"input": [LONG] * 8}, {"input": ["the cat"] * 60}]),
}
LAST: dict[str, dict[str, Any]] = {"generate": {"prompt": "the cat", "max_tokens": 2}, "embed": {"input": ["the cat"]}}


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["generate", pytest.param("embed", marks=pytest.mark.full)])
def test_a_storm_of_clients_that_go_away_leaves_nothing_behind(kind: str, tmp_path: Path) -> None:
    """However they go, whatever they asked for: all are cancelled, and the next one has its answer at once."""
    base = slow_base(tmp_path / "base", kind)
    route, common, kinds = ASKED[kind]
    path, tenants, manager = keys(tmp_path, "ann", "bob")
    with process(base, base / "adapters.db", tmp_path, "--name", "base", "--keys", str(path)) as served:
        metrics = Monitor(served.url, manager)

        def ask() -> float:
            began = time.monotonic()
            headers, body = {"Authorization": f"Bearer {tenants['bob']}"}, {"model": "base", **LAST[kind]}
            assert httpx2.post(f"{served.url}{route}", json=body, headers=headers, timeout=60).status_code == 200
            return time.monotonic() - began

        ask()
        count = 0
        for _ in range(3):  # more than the tenant's 128 places, if they were not free again
            chance, kept = random.Random(count), list[socket.socket]()
            threads = []
            for own, way, i in itertools.product(kinds, WAYS, range(10 // len(kinds))):
                model = f"a{i % 4}" if chance.random() < 0.8 else "base"
                request = post(tenants["ann"], route, **{"model": model, **common, **own})
                threads.append(threading.Thread(target=leave, args=(served.url, request, way, chance, kept)))
                count += 1
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            (steps,) = metrics("steps")
            wait_until(lambda: metrics("running", "waiting") == [0, 0], 5)
            (after,) = metrics("steps")
            assert after - steps <= 3
            assert ask() < 2
            for connection in kept:
                connection.close()
        left = [line for line in served.lines() if line["event"] == "request" and line["namespace"] == "ann"]
        statuses = [line["status"] for line in left]
        done = 0 if kind == "generate" else statuses.count(200)  # an embedding may be there before its client leaves
        assert statuses.count(499) == count - done
        assert done < count / 3
