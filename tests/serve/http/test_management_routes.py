"""Managing adapters over HTTP, limits, clients that go away, draining, metrics, and the fuzzer."""

from __future__ import annotations

import asyncio
import json
import socket
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from safetensors.torch import load_file, save_file

from kilotune.fleet import wrap
from kilotune.serve.engine.interface import Finish, Generation, Token
from kilotune.serve.http.keys import Keyring, new_key
from tests.serve.http.test_http_errors import GOOD, error
from tests.support.generation_support import loaded
from tests.support.http_support import (
    BASE,
    PlainEngine,
    Running,
    StoreCatalogue,
    adapter_folder,
    base_folder,
    batching,
    expected,
    keyring,
    serving,
    tokenizer,
)

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder), max_adapter=300_000) as made:
        yield made


@pytest.fixture
def manager(running: Running) -> Iterator[httpx2.Client]:
    with running.client(running.manager) as client:
        yield client


def files_of(folder: Path) -> dict[str, Any]:
    return {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        "weights": ("adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()),
    }


def put(client: httpx2.Client, name: str, seed: int, space: str = "ann", **fields: Any) -> httpx2.Response:
    return client.put(f"/manage/{space}/adapters/{name}", files=files_of(adapter_folder(seed)), data=fields)


def text(running: Running, model: str, space: str = "ann", count: int = 6) -> str:
    made = running.openai(space).completions.create(model=model, prompt=PROMPT, max_tokens=count, temperature=0)
    return str(made.choices[0].text)


# -- adapters ----------------------------------------------------------------------------------------


def test_an_adapter_that_was_put_answers_at_once(running: Running, manager: httpx2.Client) -> None:
    made = put(manager, "fresh", 4, alias="live", tags=["eu", "beta"], metadata='{"rows": 12}')
    assert made.status_code == 201, made.text
    assert (made.json()["version"], made.json()["tags"], made.json()["metadata"]) == (1, ["beta", "eu"], {"rows": 12})
    assert text(running, "fresh/live") == expected(4, PROMPT, 6)
    assert put(manager, "fresh", 5).json()["version"] == 2
    assert text(running, "fresh") == expected(5, PROMPT, 6), "the newest"
    assert text(running, "fresh/live") == expected(4, PROMPT, 6), "the alias stays"
    assert text(running, "fresh/1") == expected(4, PROMPT, 6)


def test_rolling_out_and_back(running: Running, manager: httpx2.Client) -> None:
    put(manager, "rolled", 4, alias="live")
    put(manager, "rolled", 5)
    where = "/manage/ann/aliases/live"
    assert manager.post(where, json={"versions": {"rolled": 2}}).json() == {"alias": "live", "versions": {"rolled": 2}}
    assert text(running, "rolled/live") == expected(5, PROMPT, 6)
    assert manager.post(f"{where}/back", json={"names": ["rolled"]}).json()["versions"] == {"rolled": 1}
    assert text(running, "rolled/live") == expected(4, PROMPT, 6)
    manager.post(where, json={"versions": {"rolled": None}})
    assert text(running, "rolled/live") == expected(5, PROMPT, 6)
    told = error(manager.post(where, json={"versions": {"rolled": 1, "roled": 1}}), 404)
    assert "Did you mean 'rolled'?" in told["message"]
    assert text(running, "rolled/live") == expected(5, PROMPT, 6), "for all of them or for none"
    assert (
        "has no alias"
        in error(manager.post("/manage/ann/aliases/beta/back", json={"names": ["rolled"]}), 409)["message"]
    )
    assert manager.delete("/manage/ann/adapters/rolled/aliases/live").json()["removed"] == "live"
    assert running.openai().models.retrieve("rolled").kilotune["aliases"] == {}


def test_deleting(running: Running, manager: httpx2.Client) -> None:
    put(manager, "gone", 4, alias="live")
    put(manager, "gone", 5)
    assert "move the alias first" in error(manager.delete("/manage/ann/adapters/gone?version=1"), 409)["message"]
    assert manager.delete("/manage/ann/adapters/gone?version=1&force=true").json() == {"name": "gone", "removed": 1}
    assert text(running, "gone") == expected(5, PROMPT, 6)
    assert manager.delete("/manage/ann/adapters/gone").json()["removed"] == 1
    with running.client(running.keys["ann"]) as ann:
        error(ann.post("/v1/completions", json={**GOOD, "model": "gone"}), 404)
    error(manager.delete("/manage/ann/adapters/gone"), 404)
    put(manager, "gone", 4)
    assert manager.delete("/manage/ann/adapters/gone?force=true").json() == {"name": "gone", "removed": 1}


def test_lists_of_adapters(manager: httpx2.Client) -> None:
    for number in range(5):
        put(manager, f"listed-{number}", 4 + number % 2, space="dora", tags=["even" if number % 2 == 0 else "odd"])
    names: list[str] = []
    after: dict[str, str] = {}
    for _ in range(3):
        page = manager.get("/manage/dora/adapters", params={"limit": 2, **after}).json()
        names += [entry["name"] for entry in page["adapters"]]
        after = {"after": names[-1]}
        assert page["more"] == (len(names) < 5)
    assert names == [f"listed-{number}" for number in range(5)]
    found = manager.get("/manage/dora/adapters", params={"tag": "odd", "pattern": "*-[12]"}).json()["adapters"]
    assert [entry["name"] for entry in found] == ["listed-1"]
    assert manager.get("/manage/dora/adapters/listed-1").json()["versions"][0]["aliases"] == []
    assert manager.get("/manage/nobody/adapters").json() == {"adapters": [], "more": False}


def test_a_managers_key_of_one_namespace_manages_that_one(tmp_path: Path) -> None:
    from kilotune.serve.http.keys import Keyring, new_key

    key, kept = new_key("manager", "ann")
    ring, tenants, manager, monitor = keyring("ann", "bob", "carl")
    ring = Keyring(None, [*ring._fixed, kept])
    with serving(tmp_path, ring=(ring, tenants, manager, monitor)) as running, running.client(key) as client:
        assert put(client, "own", 4).status_code == 201
        for answer in (
            put(client, "own", 4, space="bob"),
            client.get("/manage/bob/adapters"),
            client.post("/manage/drain"),
        ):
            assert "ann" in error(answer, 403)["message"] or "no single" in answer.text
        assert client.get("/manage/ann/adapters").status_code == 200


# -- adapters that are not fit -----------------------------------------------------------------------


def spoiled(how: str, folder: Path) -> dict[str, Any]:
    """Files that must not be taken."""
    files = files_of(adapter_folder(4))
    weights = folder / "weights.safetensors"
    tensors = load_file(adapter_folder(4) / "adapter_model.safetensors")
    key = next(iter(tensors))
    config, whole = files["config"][1], files["weights"][1]
    changed = {
        "truncated": {"weights": ("w", whole[:-7])},
        "no safetensors": {"weights": ("w", b"PK\x03\x04 a pickle, perhaps")},
        "config": {"config": ("c", b"{")},
        "method": {"config": ("c", config.replace(b"VERA", b"VEGA"))},
        "hash": {"weights": ("w", whole[:-3] + b"\x00\x01\x02")},
    }
    if how in changed:
        return {**files, **changed[how]}
    if how == "nan":
        tensors[key] = tensors[key] * float("nan")
    if how == "norm":
        tensors[key] = tensors[key] * 1e9
    if how == "shape":
        tensors[key] = tensors[key][:-1].clone()
    if how == "missing":
        del tensors[key]
    if how == "other layers":
        tensors = {name.replace("layers.0", "layers.7"): value for name, value in tensors.items()}
    save_file(tensors, weights, {"format": "pt"})
    return {**files, "weights": ("w", weights.read_bytes())}


HOWS = ["truncated", "no safetensors", "config", "method", "hash", "nan", "norm", "shape", "missing", "other layers"]


@pytest.mark.parametrize("how", HOWS)
def test_an_adapter_that_is_not_fit_is_not_there_afterwards(
    running: Running, manager: httpx2.Client, tmp_path: Path, how: str
) -> None:
    answer = manager.put("/manage/ann/adapters/spoiled", files=spoiled(how, tmp_path))
    assert answer.status_code in (400, 422), answer.text
    told = error(answer, answer.status_code)
    assert "kilotune-put" not in told["message"], "where it was put aside is nobody's business"
    with running.client(running.keys["ann"]) as ann:
        error(ann.post("/v1/completions", json={**GOOD, "model": "spoiled"}), 404)
    assert text(running, "poems") == expected(1, PROMPT, 6)


@pytest.mark.parametrize(
    ("name", "fields", "part"),
    [
        ("a%2Fb", {}, "there is no"),
        ("x" * 201, {}, "200 bytes"),
        ("ok", {"alias": "7"}, "is a number"),
        ("ok", {"alias": "latest"}, "newest"),
        ("ok", {"tags": ["t" * 101]}, "100 bytes"),
        ("ok", {"metadata": "{"}, "JSON object"),
        ("ok", {"metadata": "[1]"}, "mapping"),
        (BASE, {}, "what the base is called"),
        ("ok%E2%80%AE", {}, "RIGHT-TO-LEFT OVERRIDE (U+202E), with which it shows as another"),
        ("ok%C2%85", {}, "no control characters"),
        ("ok", {"alias": "a\u2066"}, "LEFT-TO-RIGHT ISOLATE"),
        ("ok", {"tags": ["a\u200f"]}, "RIGHT-TO-LEFT MARK"),
        ("ok", {"alias": "Jose\u0301"}, "is not in Unicode's form NFC"),
    ],
)
def test_names_aliases_and_tags_that_cannot_be(manager: httpx2.Client, name: str, fields: Any, part: str) -> None:
    answer = put(manager, name, 4, **fields)
    assert answer.status_code in (400, 404, 409), answer.text
    assert part in answer.json()["error"]["message"]


def test_a_name_is_one_in_both_forms_of_its_letters(running: Running, manager: httpx2.Client) -> None:
    made = put(manager, "Jose%CC%81", 2)
    assert (made.status_code, made.json()["name"]) == (201, "Jos\u00e9")
    again = put(manager, "Jos%C3%A9", 1)
    assert (again.status_code, again.json()["version"]) == (201, 2)
    for name in ("Jose\u0301", "Jos\u00e9"):
        assert text(running, name) == expected(1, PROMPT, 6)
        assert text(running, f"{name}/1") == expected(2, PROMPT, 6)
    shown = manager.get("/manage/ann/adapters/Jose%CC%81").json()
    assert [version["name"] for version in shown["versions"]] == ["Jos\u00e9"] * 2
    assert manager.delete("/manage/ann/adapters/Jose%CC%81").json()["removed"] == 2
    with running.client(running.keys["ann"]) as ann:
        error(ann.post("/v1/completions", json={**GOOD, "model": "Jos\u00e9"}), 404)


def test_an_upload_that_is_none(manager: httpx2.Client) -> None:
    where = "/manage/ann/adapters/none"
    assert "weights: is missing" in error(manager.put(where, files={"config": b"{}"}), 400)["message"]
    error(manager.put(where, json={}), 400)
    error(manager.put(where, content=b"--x", headers={"content-type": "multipart/form-data; boundary=x"}), 400)
    error(manager.put(where, files={"config": b"{}", "weights": b"x" * 400_000}), 413)


def test_a_full_disk_is_told_and_leaves_nothing(
    running: Running, manager: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kilotune.serve.http import puts

    monkeypatch.setattr(puts, "folder_for_put", lambda: Path("/dev/full"))
    told = error(put(manager, "full", 4), 507)
    assert "No space left" in told["message"] or "Not a directory" in told["message"]
    assert manager.get("/manage/ann/adapters", params={"pattern": "full"}).json()["adapters"] == []


def test_a_full_disk_of_the_store_is_told_and_what_is_there_is_served(tmp_path: Path) -> None:
    """SQLite itself says that it is full: the file may not grow."""
    with serving(tmp_path, **batching(tmp_path)) as running, running.client(running.manager) as manager:
        registry = running.service.adapters
        store = registry._store("ann")
        assert put(manager, "before", 3).status_code == 201

        def full(connection: sqlite3.Connection) -> None:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {pages}")

        for connection in store._idle:
            full(connection)
        told = error(put(manager, "after", 4), 507)
        assert told["code"] == "disk_full"
        assert "adapters.db" not in told["message"]
        assert registry.store_state() is None
        shown = [one["name"] for one in manager.get("/manage/ann/adapters").json()["adapters"]]
        assert "before" in shown
        assert "after" not in shown
        with running.client(running.keys["ann"]) as ann:
            answer = ann.post("/v1/completions", json={**GOOD, "model": "before"})
            assert answer.json()["choices"][0]["text"] == expected(3, GOOD["prompt"], GOOD["max_tokens"])


# -- how many at once --------------------------------------------------------------------------------


def slow(tmp_path: Path, delay: float = 0.05, **settings: Any) -> Any:
    catalogue = StoreCatalogue(f"sqlite:///{tmp_path / 'adapters.db'}")
    return serving(tmp_path, catalogue=catalogue, delay=delay, **settings)


def many(client: httpx2.Client, count: int, **body: Any) -> list[httpx2.Response]:
    answers: list[httpx2.Response] = []
    asks = [
        threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json={**GOOD, **body})))
        for _ in range(count)
    ]
    for one in asks:
        one.start()
    for one in asks:
        one.join()
    return answers


def test_too_many_at_once_are_told_when_to_come_again(tmp_path: Path) -> None:
    settings = {"max_requests": 8, "max_requests_per_tenant": 4}
    with slow(tmp_path, **settings) as running, running.client(running.keys["ann"]) as ann:
        answers = many(ann, 10, max_tokens=8)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert sorted({answer.status_code for answer in answers}) == [200, 429]
        assert len(answers) - len(refused) >= 4
        assert all(1 <= int(answer.headers["retry-after"]) <= 30 for answer in refused)
        assert error(refused[0], 429)["type"] == "rate_limit_error"
        assert "may have 4" in refused[0].json()["error"]["message"]
        assert ann.post("/v1/completions", json=GOOD).status_code == 200, "places are given back"
        assert running.service.gate.count == 0
        assert "5 answers at once" in error(ann.post("/v1/completions", json={**GOOD, "n": 5}), 400)["message"]


def test_a_full_house_lets_in_who_has_nothing_running(tmp_path: Path) -> None:
    settings = {"max_requests": 4, "max_requests_per_tenant": 4}
    with (
        slow(tmp_path, **settings) as running,
        running.client(running.keys["ann"]) as ann,
        running.client(running.keys["bob"]) as bob,
    ):
        busy = threading.Thread(target=lambda: many(ann, 4, max_tokens=20))
        busy.start()
        while running.service.gate.count < 4:
            time.sleep(0.005)
        assert bob.post("/v1/completions", json={**GOOD, "model": BASE}).status_code == 200
        busy.join()


def test_a_deadline_ends_a_prompt_that_waits_for_its_turn(tmp_path: Path) -> None:
    async def never(*given: Any, **more: Any) -> Any:
        await asyncio.Event().wait()

    chat: Any = {"model": BASE, "messages": [{"role": "user", "content": "a"}]}
    with serving(tmp_path) as running, running.client(running.keys["ann"]) as ann:
        running.service.prompts.chat = running.service.prompts.plain = never
        for path, body in (
            ("/v1/completions", {**GOOD, "model": BASE}),
            ("/v1/chat/completions", chat),
            ("/v1/responses", {"model": BASE, "input": "a"}),
        ):
            told = error(ann.post(path, json={**body, "timeout": 0.1}), 504)
            assert told["code"] == "deadline_exceeded"
        assert running.service.gate.count == 0


def test_tokens_are_not_waited_for_without_end(tmp_path: Path) -> None:
    async def never(*given: Any, **more: Any) -> Any:
        await asyncio.Event().wait()

    with serving(tmp_path, max_seconds=0.2) as running, running.client(running.keys["ann"]) as ann:
        prompts = running.service.prompts
        prompts.chat = prompts.tokens = prompts.decoded = never  # type: ignore[method-assign]
        for path, body in (
            ("/tokenize", {"prompt": "a"}),
            ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
            ("/detokenize", {"tokens": [1]}),
        ):
            assert error(ann.post(path, json=body), 504)["code"] == "deadline_exceeded"
        assert running.service.gate.count == 0


def test_a_message_has_so_many_parts_and_no_more(tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.client(running.keys["ann"]) as ann:
        parts = [{"type": "text", "text": "a"}] * 1025
        body = {"model": BASE, "messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        told = error(ann.post("/v1/chat/completions", json=body), 400)
        assert "messages[0].content" in told["message"]


def test_a_deadline_ends_an_answer(tmp_path: Path) -> None:
    with slow(tmp_path) as running, running.client(running.keys["ann"]) as ann:
        body = {**GOOD, "max_tokens": 40, "timeout": 0.3, "ignore_eos": True}
        failed = ann.get("/v1/usage").json()["errors"]
        told = error(ann.post("/v1/completions", json=body), 504)
        assert ann.get("/v1/usage").json()["errors"] == failed + 1
        assert told["code"] == "deadline_exceeded"
        lines = [line for line in ann.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n") if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert len(lines) > 3


def test_a_client_that_goes_away_is_no_longer_worked_for(tmp_path: Path) -> None:
    with slow(tmp_path) as running:
        for stream in (True, False):
            asked = len(running.engine.asked)
            body = json.dumps({**GOOD, "max_tokens": 50, "ignore_eos": True, "stream": stream, "n": 2}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.keys['ann']}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(running.url.removeprefix("http://").split(":")) as connection:
                connection.sendall(head.encode() + body)
                while len(running.engine.asked) < asked + 2:
                    time.sleep(0.005)
                time.sleep(0.15)
            until = time.monotonic() + 2
            while len(running.engine.left) < asked + 2 and time.monotonic() < until:
                time.sleep(0.01)
            assert sorted(running.engine.left[asked:]) == sorted(one.id for one in running.engine.asked[asked:])
            assert running.service.gate.count == 0
        assert running.engine.running == 0


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    with serving(tmp_path, body_seconds=0.3) as running:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.keys['ann']}\r\n"
        head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        with socket.create_connection(running.url.removeprefix("http://").split(":")) as connection:
            connection.settimeout(5)
            connection.sendall(head.encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"request_timeout" in answer


class Flooding(PlainEngine):
    """An answer without an end, in large pieces."""

    async def generate(self, request: Generation) -> AsyncIterator[Token | Finish]:
        self.running += 1
        try:
            while True:
                yield Token(5, "x" * 2**18, None, ())
                await asyncio.sleep(0)
        finally:
            self.running -= 1


def test_a_client_that_takes_nothing_of_its_answer_is_dropped(tmp_path: Path) -> None:
    """What is between both fills, and then no longer is waited than ``write_seconds``."""
    catalogue = StoreCatalogue(f"sqlite:///{tmp_path / 'adapters.db'}")
    engine = Flooding(wrap(loaded("llama", base_folder())), tokenizer(), catalogue)
    with serving(tmp_path, engine=engine, catalogue=catalogue, write_seconds=0.5) as running:
        body = json.dumps({**GOOD, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {running.keys['ann']}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(running.url.removeprefix("http://").split(":")) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: engine.running == 1)
            wait_for(lambda: engine.running == 0 and running.service.gate.count == 0)
            with running.client(running.monitor) as monitor:
                assert 'status="499"' in monitor.get("/metrics").text


def wait_for(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it does not come to that"
        time.sleep(0.01)


# -- health, draining, metrics -----------------------------------------------------------------------


def test_draining_refuses_what_is_new_and_lets_the_rest_end(tmp_path: Path) -> None:
    with (
        slow(tmp_path) as running,
        running.client(running.keys["ann"]) as ann,
        running.client(running.manager) as manager,
    ):
        with httpx2.Client(base_url=running.url) as anyone:
            assert (anyone.get("/health").status_code, anyone.get("/ready").status_code) == (200, 200)
            body = {**GOOD, "max_tokens": 12, "stream": True, "ignore_eos": True}
            with ann.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                assert manager.post("/manage/drain").json()["draining"] is True
                assert (anyone.get("/health").status_code, anyone.get("/ready").status_code) == (200, 503)
                with running.client(running.keys["ann"]) as late:
                    told = late.post("/v1/completions", json=GOOD)
                    assert error(told, 503)["code"] == "unavailable"
                    assert told.headers["retry-after"]
                assert "data: [DONE]" in list(lines)
            assert manager.get("/manage").json()["draining"] is True
            manager.delete("/manage/drain")
            assert anyone.get("/ready").status_code == 200
        assert ann.post("/v1/completions", json=GOOD).status_code == 200


def test_an_engine_that_failed_is_not_healthy(tmp_path: Path) -> None:
    with serving(tmp_path) as running, httpx2.Client(base_url=running.url) as anyone:
        running.engine.fault = RuntimeError("out of memory on cuda:3")
        for path in ("/health", "/ready"):
            answer = anyone.get(path)
            assert (answer.status_code, answer.json()) == (503, {"status": "failed"})


def test_metrics_count_and_name_few_tenants(tmp_path: Path) -> None:
    ring = keyring("ann", "bob", "carl", "dora")
    with serving(tmp_path, ring=ring, metrics_tenants=2) as running:
        for space in ("ann", "bob", "carl", "dora"):
            with running.client(running.keys[space]) as client:
                client.post("/v1/completions", json={**GOOD, "model": BASE, "max_tokens": 3, "ignore_eos": True})
        with running.client(running.monitor) as monitor:
            lines = monitor.get("/metrics").text.splitlines()
        found = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
        tokens = {name: value for name, value in found.items() if name.startswith("kilotune_completion_tokens_total")}
        assert tokens == {
            'kilotune_completion_tokens_total{tenant="ann"}': 3,
            'kilotune_completion_tokens_total{tenant="bob"}': 3,
            'kilotune_completion_tokens_total{tenant="other"}': 6,
        }
        assert found['kilotune_requests_total{route="/v1/completions",status="200",tenant="other"}'] == 2
        assert found["kilotune_first_token_seconds_count"] == 4
        assert found["kilotune_engine_generated_tokens_total"] >= 12


def test_a_manager_of_one_namespace_sees_its_own_numbers_alone(tmp_path: Path) -> None:
    ring, keys, manager, monitor = keyring("ann", "bob", "carl")
    (own, kept), (late, last) = new_key("manager", "ann"), new_key("manager", "carl")
    whole = Keyring(None, [*ring._fixed, kept, last])
    with serving(tmp_path, ring=(whole, keys, manager, monitor), metrics_tenants=2) as running:
        for space, count in (("ann", 1), ("bob", 2), ("carl", 3)):
            with running.client(running.keys[space]) as client:
                for _ in range(count):
                    client.post("/v1/completions", json={**GOOD, "model": BASE, "max_tokens": 3, "ignore_eos": True})
        with running.client(own) as ann, running.client(late) as carl, running.client(running.manager) as all_of_them:
            seen, others = ann.get("/metrics").text, all_of_them.get("/metrics").text
            among_others = carl.get("/metrics").text  # not named: what is "other" is of several
    lines = [line for line in seen.splitlines() if not line.startswith("#")]
    assert 'kilotune_completion_tokens_total{tenant="ann"} 3.0' in lines
    assert all('tenant="ann"' in line for line in lines)
    assert 'tenant="bob"' in others
    assert "kilotune_engine_steps" in others
    assert [line for line in among_others.splitlines() if not line.startswith("#")] == []


def test_ones_own_usage(running: Running) -> None:
    with running.client(running.keys["carl"]) as carl:
        for _ in range(3):
            carl.post("/v1/completions", json={**GOOD, "model": BASE, "max_tokens": 5, "ignore_eos": True})
        seen = carl.get("/v1/usage").json()
    assert (seen["namespace"], seen["requests"], seen["running"]) == ("carl", 3, 0)
    assert seen["tokens_per_second"] == pytest.approx(1.5)
    assert 0 < seen["first_token_p50"] <= seen["answer_p50"] <= seen["answer_p99"]
