"""Everything at once against one service: put, replace, delete, wrong requests, slow clients, clients that go away.

Every answer is that of the adapter alone, whatever went on beside it; memory does not grow; no error but the expected.
KILOTUNE_SOAK is how many seconds the long form takes (600 by default).
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.http.test_process import keys, process
from tests.support.http_support import BASE, adapter_folder, base_folder, batching, expected, serving

PROMPTS = ("the cat sat on", "a small house", "once more")
STILL = {("ann", "poems"): 1, ("ann", "letters"): 2, ("bob", "secret-plans"): 3, ("carl", BASE): None}
SEEDS = (1, 2, 3, 4)
COUNT = 6
LONG = float(os.environ.get("KILOTUNE_SOAK", "600"))
WRONG: list[tuple[dict[str, Any], int]] = [
    ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
    ({"content": b"{"}, 415),
    ({"json": {"model": "secret-plans", "prompt": "x"}}, 404),  # bob's, by ann
    ({"json": {"model": "poems", "prompt": "x", "temperature": -1}}, 400),
    ({"json": {"model": "poems", "prompt": "word " * 500}}, 400),
    ({"json": {"model": "poems", "prompt": "x"}, "headers": {"Authorization": "Bearer nobody"}}, 401),
]

answer_of = functools.lru_cache(maxsize=None)(expected)


@dataclass(frozen=True)
class Place:
    """A service. keys: by namespace; manager: for all of them."""

    url: str
    keys: dict[str, str]
    manager: str


class Soak:
    """What goes on, by threads; faults: what must not have been."""

    def __init__(self, running: Place, seconds: float) -> None:
        self.running, self.until = running, time.monotonic() + seconds
        self.done: Counter[str] = Counter()
        self.faults: list[str] = []

    def run(self) -> None:
        parts: list[Callable[[random.Random, httpx2.Client], None]] = [self.ask, self.ask, self.moving, self.change]
        parts += [self.leave, self.slow, self.wrong]
        threads = [threading.Thread(target=self._again, args=(part, i)) for i, part in enumerate(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG + 120)
            assert not thread.is_alive(), "a request hangs"

    def _again(self, part: Callable[[random.Random, httpx2.Client], None], seed: int) -> None:
        chance = random.Random(seed)
        with httpx2.Client(base_url=self.running.url, timeout=60) as client:
            while time.monotonic() < self.until and len(self.faults) < 10:
                try:
                    part(chance, client)
                except Exception as error:
                    self.faults.append(f"{part.__name__}: {type(error).__name__}: {error}")
                else:
                    self.done[part.__name__] += 1

    def body(self, model: str, prompt: str, **more: Any) -> dict[str, Any]:
        return {"model": model, "prompt": prompt, "max_tokens": COUNT, "temperature": 0, **more}

    def key(self, tenant: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.running.keys[tenant]}"}

    def ask(self, chance: random.Random, client: httpx2.Client) -> None:
        (tenant, model), seed = chance.choice(list(STILL.items()))
        prompt = chance.choice(PROMPTS)
        got = client.post("/v1/completions", json=self.body(model, prompt), headers=self.key(tenant))
        assert got.status_code == 200, got.text
        assert got.json()["choices"][0]["text"] == answer_of(seed, prompt, COUNT), (tenant, model, prompt)

    def moving(self, chance: random.Random, client: httpx2.Client) -> None:
        """The adapter that is replaced and deleted all the time: one of its versions, whole, or 404."""
        prompt = chance.choice(PROMPTS)
        got = client.post("/v1/completions", json=self.body("moving", prompt), headers=self.key("ann"))
        if got.status_code != 404:
            assert got.status_code == 200, got.text
            assert got.json()["choices"][0]["text"] in {answer_of(seed, prompt, COUNT) for seed in SEEDS}, prompt

    def change(self, chance: random.Random, client: httpx2.Client) -> None:
        manager = {"Authorization": f"Bearer {self.running.manager}"}
        if chance.random() < 0.25:
            got = client.delete("/manage/ann/adapters/moving", headers=manager)
            assert got.status_code in (200, 204, 404), got.text
            return
        folder = adapter_folder(chance.choice(SEEDS))
        names = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}
        files = {part: (folder / name).read_bytes() for part, name in names.items()}
        if chance.random() < 0.2:
            files["weights"] = files["weights"][:-40]
            assert client.put("/manage/ann/adapters/moving", files=files, headers=manager).status_code == 422
            return
        assert client.put("/manage/ann/adapters/moving", files=files, headers=manager).status_code in (200, 201)

    def leave(self, chance: random.Random, client: httpx2.Client) -> None:
        """A client that goes away in the midst of an answer."""
        body = self.body("poems", chance.choice(PROMPTS), stream=True, ignore_eos=True) | {"max_tokens": 40}
        with client.stream("POST", "/v1/completions", json=body, headers=self.key("ann")) as got:
            assert got.status_code == 200
            next(got.iter_lines())

    def slow(self, chance: random.Random, client: httpx2.Client) -> None:
        """A client that takes its time."""
        prompt, text = chance.choice(PROMPTS), ""
        body = self.body("letters", prompt, stream=True)
        with client.stream("POST", "/v1/completions", json=body, headers=self.key("ann")) as got:
            for line in got.iter_lines():
                time.sleep(0.05)
                if line.startswith("data: {"):
                    choices = httpx2.Response(200, content=line[6:].encode()).json()["choices"]
                    text += "".join(choice["text"] for choice in choices)
        assert text == answer_of(2, prompt, COUNT)

    def wrong(self, chance: random.Random, client: httpx2.Client) -> None:
        what, status = chance.choice(WRONG)
        got = client.post("/v1/completions", **{**what, "headers": self.key("ann") | what.get("headers", {})})
        assert got.status_code == status, (what, got.status_code, got.text)
        assert got.json()["error"]["message"]
        time.sleep(0.01)


def memory(pid: int) -> int:
    """Bytes that a process has in memory now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(place: Place, pid: int, seconds: float) -> tuple[Soak, int, int]:
    """(what went on; the service's memory after the first third, and at the end)."""
    for prompt in PROMPTS:
        for seed in (None, *SEEDS):
            answer_of(seed, prompt, COUNT)
    first = Soak(place, seconds / 3)
    first.run()
    before = memory(pid)
    rest = Soak(place, 2 * seconds / 3)
    rest.run()
    rest.faults += first.faults
    rest.done += first.done
    return rest, before, memory(pid)


def check(done: Soak, before: int, after: int, allowed: int) -> None:
    assert done.faults == []
    assert {"ask", "moving", "change", "leave", "slow", "wrong"} <= set(done.done), done.done
    assert after - before < allowed, f"memory grew from {before} to {after} bytes"


@pytest.mark.heavy
def test_a_short_soak(tmp_path: Path) -> None:
    """In this process, where one can see that nothing is left over."""
    with serving(tmp_path, **batching(tmp_path)) as running:
        found = soak(Place(running.url, running.keys, running.manager), os.getpid(), 9.0)
        until = time.monotonic() + 30
        while (stats := running.engine.stats()).running + stats.waiting and time.monotonic() < until:
            time.sleep(0.05)
        assert (stats.running, stats.waiting) == (0, 0), "requests of clients that left still run"
        assert running.engine.healthy() is None
    check(*found, allowed=96 * 2**20)


@pytest.mark.full
@pytest.mark.timeout(int(LONG) + 600)
def test_a_long_soak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``kilotune serve`` in a process of its own."""
    path, tenants, manager = keys(tmp_path, "ann", "bob", "carl")
    with process(base_folder(), tmp_path / "adapters.db", tmp_path, "--keys", str(path), "--name", BASE) as served:
        for (space, name), seed in STILL.items():
            if seed is not None:
                assert served.put(manager, space, name, adapter_folder(seed)).status_code == 201
        done, before, after = soak(Place(served.url, tenants, manager), served.process.pid, LONG)
        with capsys.disabled():
            print(f"\nsoak of {LONG:g} s: {dict(done.done)}; {before / 2**20:.0f} MiB, then {after / 2**20:.0f} MiB")
        check(done, before, after, allowed=64 * 2**20)
        levels = {line["level"] for line in served.lines() if line.get("event") != "request"}
        assert levels <= {"info", "INFO"}, levels
