"""Two replicas under Ray Serve, for real, on this machine: each tenant's own answers, from where the adapter is."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from kilotune.errors import ConfigError
from kilotune.fleet.store import open_store
from kilotune.serve.http.keys import add_key
from kilotune.serve.replicas import _Front, _front, adapter_of, application
from tests.support.http_support import adapter_folder, base_folder, expected
from tests.support.paths import SUPPORT

SCRIPT = SUPPORT / "replicas_script.py"
TENANTS = {"ann": 1, "bob": 2, "cat": 3, "dan": 4}  # namespace -> the seed of its adapter "mine"
PROMPT = "the small house"


def scope(path: str = "/v1/completions", key: str = "k") -> dict[str, Any]:
    return {"path": path, "headers": [(b"authorization", f"Bearer {key}".encode())]}


def test_an_adapter_is_told_by_key_and_name_whatever_its_version() -> None:
    def of(model: object, **more: str) -> str:
        return adapter_of(scope(**more), json.dumps({"model": model}).encode())

    assert of("mine") == of("mine/3") == of("mine/live") != ""
    assert len({of("mine"), of("other"), of("mine", key="another")}) == 3
    assert "mine" not in of("mine")
    assert of("mine", path="/v1/models") == ""
    assert [adapter_of(scope(), body) for body in (b"", b"{", b"[]", b'{"model": 3}', b"[" * 100_000)] == [""] * 5
    assert of("\ud800") != ""  # half of a character is the replica's to refuse


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"resident": True}, {"concurrency": 1.5}])
def test_numbers_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected a whole number, at least 1, got"):
        application(lambda: None, **wrong)  # type: ignore[arg-type, return-value]


PAGE, OTHER = "https://app.example.com", "https://evil.example.com"
FOUND = [
    {"type": "http.response.start", "status": 200, "headers": [(b"access-control-allow-origin", PAGE.encode())]},
    {"type": "http.response.body", "body": b"ok"},
]


class Replicas:
    """One that answers, or none."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages, self.answer = messages, self

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, scope: Any, body: bytes) -> Replicas:
        return self

    def cancel(self) -> None: ...

    async def __aiter__(self) -> AsyncIterator[Any]:
        if not self.messages:
            raise RuntimeError("no replica")
        for message in self.messages:
            yield message


def ask(
    front: Any, origin: str, method: str = "POST", headers: dict[str, str] | None = None, content: bytes = b""
) -> httpx2.Response:
    async def asked() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(front), base_url="http://front") as client:
            told = {"origin": origin, **(headers or {})}
            return await client.request(method, "/v1/models", headers=told, content=content)

    return asyncio.run(asked())


def test_the_fronts_own_answers_are_for_the_pages_that_may_ask() -> None:
    front = _front(Replicas([]), 10, (PAGE,))
    for body, status in ((b"", 503), (b"x" * 11, 413)):
        assert ask(front, PAGE, content=body).status_code == status
        assert ask(front, PAGE, content=body).headers["access-control-allow-origin"] == PAGE
        assert "access-control-allow-origin" not in ask(front, OTHER, content=body).headers
    wants = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert ask(front, PAGE, "OPTIONS", headers=wants).status_code == 200
    assert ask(front, OTHER, "OPTIONS", headers=wants).status_code == 400
    answered = ask(_front(Replicas(FOUND), 10, (PAGE,)), PAGE)
    assert (answered.text, answered.headers.get_list("access-control-allow-origin")) == ("ok", [PAGE])
    assert isinstance(_front(Replicas([]), 10, ()), _Front), "off by default"


def test_origins_that_are_none() -> None:
    with pytest.raises(ConfigError, match="cors.origin: expected an origin such as https://app.example.com"):
        application(lambda: None, cors_origin=("https://app.example.com/path",))  # type: ignore[arg-type, return-value]


@dataclass
class Cluster:
    url: str
    keys: dict[str, str]
    manager: str

    def complete(self, tenant: str, model: str = "mine", **more: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {self.keys.get(tenant, tenant)}"}
        body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, **more}
        return httpx2.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = tmp_path_factory.mktemp("replicas")
    store = f"sqlite:///{place / 'adapters.db'}"
    for tenant, seed in TENANTS.items():
        with open_store(store, namespace=tenant) as opened:
            opened.put("mine", adapter_folder(seed))
    keys = {tenant: add_key(place / "keys.json", "tenant", tenant)[0] for tenant in TENANTS}
    manager = add_key(place / "keys.json", "manager", None)[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-W", "ignore", str(SCRIPT), str(base_folder()), store, str(place / "keys.json")]
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "0"}
    # Its own five and ten seconds are short for a process that begins on a machine with two busy cores.
    quiet |= {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "60" for check in ("READY", "HEALTH")}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        (place / "log").open("w") as log,
        subprocess.Popen([*words, str(port)], **pipes, stderr=log, env=os.environ | quiet) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(b'{"ready"'):
                break
        else:
            process.wait()
            pytest.fail(f"no replicas: {(place / 'log').read_text()[-3000:]}")
        yield Cluster(f"http://127.0.0.1:{port}", keys, manager)
        process.stdin.close()
        process.stdout.read()


@pytest.mark.full
@pytest.mark.timeout(900)
class TestReplicas:
    def test_each_tenant_gets_its_own_answers_from_where_its_adapter_is(self, cluster: Cluster) -> None:
        where: dict[str, set[str]] = {tenant: set() for tenant in TENANTS}
        for turn in range(6):
            for tenant, seed in TENANTS.items():
                answer = cluster.complete(tenant)
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == expected(seed, PROMPT, 6), tenant
                if turn >= 2:  # Ray hears of a new adapter after a moment
                    where[tenant].add(answer.headers["x-kilotune-replica"])
        assert {len(replicas) for replicas in where.values()} == {1}
        assert len(set().union(*where.values())) == 2, "one replica has all tenants"

    def test_the_openai_client_streams(self, cluster: Cluster) -> None:
        import openai

        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=cluster.keys["bob"], max_retries=0, timeout=60)
        parts = client.completions.create(model="mine", prompt=PROMPT, max_tokens=6, temperature=0, stream=True)
        assert "".join(part.choices[0].text for part in parts if part.choices) == expected(2, PROMPT, 6)

    def test_errors_are_the_services_own(self, cluster: Cluster) -> None:
        assert cluster.complete("nobody").status_code == 401
        unknown = cluster.complete("ann", "min")
        assert (unknown.status_code, "'mine'" in unknown.json()["error"]["message"]) == (404, True)
        assert httpx2.get(f"{cluster.url}/health", timeout=60).status_code == 200

    def test_what_one_replica_puts_all_have(self, cluster: Cluster) -> None:
        headers = {"authorization": f"Bearer {cluster.manager}"}
        folder = adapter_folder(1)
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        put = httpx2.put(f"{cluster.url}/manage/dan/adapters/new", files=files, headers=headers, timeout=60)
        assert put.status_code < 300, put.text
        answers = [cluster.complete("dan", "new") for _ in range(4)]
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {expected(1, PROMPT, 6)}
