"""What operators see and set: metrics by adapter, pages of other origins, slow requests, the end of a process."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from kilotune.errors import ConfigError
from kilotune.serve.http import process as http_process
from kilotune.serve.http.keys import Keyring, new_key
from kilotune.serve.http.settings import ServeSettings
from tests.serve.http.test_http_errors import GOOD, error
from tests.serve.http.test_leaving_clients import slow_base
from tests.serve.http.test_management_routes import wait_for
from tests.serve.http.test_process import complete, process
from tests.support.cli_helpers import error as refused
from tests.support.http_support import BASE, Running, adapter_folder, base_folder, batching, keyring, serving
from tests.support.paths import ROOT

ASK = {**GOOD, "max_tokens": 3, "ignore_eos": True}
ORIGIN = "https://app.example.com"


def samples(text: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Sample -> its labels, sorted -> the value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def ask(running: Running, space: str, **more: Any) -> httpx2.Response:
    with running.client(running.keys[space]) as client:
        return client.post("/v1/completions", json={**ASK, **more})


def metrics(running: Running, key: str | None = None) -> str:
    with running.client(key or running.monitor) as client:
        return str(client.get("/metrics").text)


def of(tenant: str, adapter: str, **more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"tenant": tenant, "adapter": adapter, **more}.items()))


# -- metrics -----------------------------------------------------------------------------------------


def test_metrics_by_adapter_count_what_was_asked(tmp_path: Path) -> None:
    """With the real engine: requests, tokens in and out, what the cache had, and first tokens."""
    prompt = [5 + i % 30 for i in range(40)]
    with serving(tmp_path, **batching(tmp_path)) as running:
        for _ in range(3):
            usage = ask(running, "ann", model="poems", prompt=prompt).json()["usage"]
            assert usage["completion_tokens"] == 3
        assert ask(running, "ann", model="letters/1", prompt=prompt).status_code == 200
        assert ask(running, "bob", model=BASE).status_code == 200
        assert ask(running, "ann", model="nobody").status_code == 404
        found, own = samples(metrics(running)), usage["prompt_tokens_details"]["cached_tokens"]
    assert found["kilotune_adapter_requests_total"] == {
        of("ann", "poems", status="200"): 3,
        of("ann", "letters", status="200"): 1,
        of("bob", BASE, status="200"): 1,
    }
    assert found["kilotune_adapter_prompt_tokens_total"][of("ann", "poems")] == 120
    assert found["kilotune_adapter_completion_tokens_total"][of("ann", "poems")] == 9
    assert own > 0
    assert found["kilotune_adapter_cached_tokens_total"][of("ann", "poems")] == 2 * own
    assert found["kilotune_adapter_cached_tokens_total"][of("ann", "letters")] == 0
    assert found["kilotune_adapter_first_token_seconds_count"][of("ann", "poems")] == 3
    assert found["kilotune_queue_seconds_count"][()] == 5
    assert 0 <= found["kilotune_queue_seconds_sum"][()] < 60


def test_what_is_asked_makes_no_labels_without_end(tmp_path: Path) -> None:
    """More adapters than are named, each under several names, and names and tenants that are called as the rest is."""
    ring = keyring("ann", "bob", "carl", "other")
    with serving(tmp_path, ring=ring, metrics_tenants=2, metrics_adapters=3) as running:
        for i in range(6):
            running.catalogue.put("ann", f"more-{i}", adapter_folder(1))
        running.catalogue.put("bob", "other", adapter_folder(1))
        running.catalogue.put("carl", "own", adapter_folder(1))
        for _ in range(2):
            for model in ["poems", "poems/1", "poems/live", *(f"more-{i}" for i in range(6)), "no-such", "x/9"]:
                ask(running, "ann", model=model)
        for space, model in (("bob", "other"), ("bob", BASE), ("carl", "own"), ("other", BASE), ("carl", BASE)):
            ask(running, space, model=model)
        found = samples(metrics(running))["kilotune_adapter_completion_tokens_total"]
    assert found == {
        of("ann", "poems"): 18,
        of("ann", "more-0"): 6,
        of("ann", "more-1"): 6,
        of("ann", "other"): 24,
        of("bob", "other"): 3,
        of("bob", BASE): 3,
        of("other", "other"): 3,
        of("other", BASE): 6,
    }


def test_a_manager_of_one_namespace_sees_its_adapters_alone(tmp_path: Path) -> None:
    ring, keys, manager, monitor = keyring("ann", "bob", "other")
    made = {space: new_key("manager", space) for space in ("ann", "other")}
    whole = Keyring(None, [*ring._fixed, *(kept for _, kept in made.values())])
    with serving(tmp_path, ring=(whole, keys, manager, monitor), metrics_tenants=1) as running:
        for space, model in (("ann", "poems"), ("bob", "secret-plans"), ("other", BASE)):
            ask(running, space, model=model)
        seen, others = metrics(running, made["ann"][0]), metrics(running, made["other"][0])
    assert samples(seen)["kilotune_adapter_requests_total"] == {of("ann", "poems", status="200"): 1}
    assert "secret" not in seen
    assert "bob" not in seen
    assert others == "", "a namespace that is called as the rest is does not see the rest"


def test_counters_are_counters(tmp_path: Path) -> None:
    """Each has _total and its type, and none falls."""
    with serving(tmp_path, **batching(tmp_path)) as running:
        ask(running, "ann")
        before = metrics(running)
        ask(running, "ann", model="poems")
        after = metrics(running)
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", after, re.MULTILINE))
    counters = {name for name, kind in kinds.items() if kind == "counter"}
    assert {"kilotune_engine_steps_total", "kilotune_engine_generated_tokens_total"} <= counters
    assert all(name.endswith("_total") for name in counters)
    assert not [name for name, kind in kinds.items() if kind == "gauge" and "_total" in name]
    first, second = samples(before), samples(after)
    for name in counters:
        for labels, value in first.get(name, {}).items():
            assert second[name][labels] >= value, name
    assert second["kilotune_engine_steps_total"][()] > first["kilotune_engine_steps_total"][()]


# -- the dashboard -----------------------------------------------------------------------------------

SELECTOR = re.compile(r"(kilotune_\w+)(?:\{([^}]*)\})?(\[)?")


def test_each_query_of_the_dashboard_is_of_what_is_exposed(tmp_path: Path) -> None:
    """Names, labels and types, held against a service that has answered, refused and failed."""
    with serving(tmp_path, **batching(tmp_path)) as running:
        for _ in range(2):
            ask(running, "ann", model="poems")
        text = metrics(running)
    exposed, kinds = samples(text), dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    document = json.loads((ROOT / "examples" / "serve" / "grafana.json").read_text())
    targets = [target for panel in document["panels"] for target in panel.get("targets", ())]
    assert len(targets) > 20
    for target in targets:
        query, used = target["expr"], set[str]()
        for name, matchers, ranged in SELECTOR.findall(query):
            labels = {label for series in exposed[name] for label, _ in series}
            assert {part.partition("=")[0].strip(" ~!") for part in matchers.split(",") if part} <= labels, query
            counted = kinds.get(name) == "counter" or name.endswith("_bucket")
            assert counted == bool(ranged), f"{query}: a counter is for a rate, a gauge is not"
            used |= labels
        for kept in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in kept.split(",")} <= used, query
        grouped = {label.strip() for kept in re.findall(r"by \(([^)]*)\)", query) for label in kept.split(",")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped, query
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            (name, label) = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            assert all(label in dict(series) for series in exposed[name])


# -- pages of other origins --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_to_pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("cors")
    with serving(folder, cors_origin=[ORIGIN, "http://localhost:5173"], max_body=2000) as made:
        yield made


def preflight(running: Running, origin: str, path: str = "/v1/chat/completions", method: str = "POST") -> Any:
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    with running.client() as client:
        return client.options(path, headers={"Origin": origin, **asked})


def page_of(running: Running, key: str, origin: str = ORIGIN) -> httpx2.Client:
    """What a page of this origin sends."""
    client = running.client(key)
    client.headers["Origin"] = origin
    return client


def test_a_preflight_is_answered_without_a_key(open_to_pages: Running) -> None:
    for origin in (ORIGIN, "http://localhost:5173"):
        answer = preflight(open_to_pages, origin)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        assert "Origin" in answer.headers["vary"]
        assert "access-control-allow-credentials" not in answer.headers
    for method in ("GET", "PUT", "DELETE"):
        assert preflight(open_to_pages, ORIGIN, "/manage/ann/adapters/x", method).status_code == 200
    for other in ("https://evil.example", "https://app.example.com.evil.example", "http://app.example.com", "null"):
        answer = preflight(open_to_pages, other)
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers


def test_answers_and_errors_carry_the_header(open_to_pages: Running) -> None:
    with page_of(open_to_pages, open_to_pages.keys["ann"]) as page:
        found = [
            (200, page.post("/v1/completions", json=ASK)),
            (400, page.post("/v1/completions", json={**ASK, "no_such": 1})),
            (404, page.post("/v1/completions", json={**ASK, "model": "none"})),
            (404, page.get("/nowhere")),
            (413, page.post("/v1/completions", json={**ASK, "prompt": "x" * 3000})),
            (403, page.get("/manage")),
            (200, page.get("/ready")),
        ]
        with page.stream("POST", "/v1/completions", json={**ASK, "stream": True}) as stream:
            found.append((200, stream))
            assert "data: [DONE]" in list(stream.iter_lines())
    with page_of(open_to_pages, "kt-wrong") as nobody:
        found.append((401, nobody.get("/v1/models")))
    for status, answer in found:
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN, status
        assert "Origin" in answer.headers["vary"]
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in answer.headers
    with page_of(open_to_pages, open_to_pages.keys["ann"], "https://evil.example") as other:
        answer = other.post("/v1/completions", json=ASK)
        assert "access-control-allow-origin" not in answer.headers
        assert "Origin" in answer.headers["vary"]


def test_no_page_may_ask_unless_it_is_said(tmp_path: Path) -> None:
    with serving(tmp_path) as running:
        assert preflight(running, ORIGIN).status_code == 401
        with page_of(running, running.keys["ann"]) as page:
            assert not [name for name in page.get("/v1/models").headers if name.startswith("access-control")]


def test_all_origins_need_keys_and_origins_are_origins() -> None:
    assert ServeSettings(keys="k.json", cors_origin=["*"]).cors_origin == ("*",)
    with pytest.raises(ConfigError, match=r"serve\.cors_origin: with '\*' any web page could ask"):
        ServeSettings(cors_origin=["*"])
    for wrong in (
        "app.example.com",
        "https://app.example.com/",
        "https://APP.example.com",
        "",
        "https://*.example.com",
    ):
        with pytest.raises(ConfigError, match=r"cors_origin: expected an origin such as https://app\.example\.com"):
            ServeSettings(cors_origin=[wrong])
    told = refused("serve", "--model", "base", "--store", "sqlite:///x.db", "--cors-origin", "app.example.com")
    assert "serve.cors_origin: expected an origin" in told
    told = refused("serve", "--model", "base", "--store", "sqlite:///x.db", "--set", "slow_request=1")
    assert "--slow-request" in told


# -- slow requests -----------------------------------------------------------------------------------


def test_slow_requests_have_a_line_with_their_waits_and_no_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kilotune.serve")
    with serving(tmp_path, **batching(tmp_path), slow_request=0.0) as running:
        assert ask(running, "ann", model="poems/live", prompt="the cat sat on").status_code == 200
        with running.client(running.keys["ann"]) as client:
            client.headers["x-request-id"] = "mine-1"
            client.post("/v1/chat/completions", json={"model": BASE, "messages": [{"role": "user", "content": "cat"}]})
            client.post("/v1/completions", json={**ASK, "model": "nobody"})
        wait_for(lambda: len([1 for one in caplog.records if one.getMessage() == "slow request"]) == 3)
    lines = [vars(one)["fields"] for one in caplog.records if one.getMessage() == "slow request"]
    assert [sorted(line) for line in lines] == [
        sorted(
            ["request_id", "route", "status", "namespace", "adapter", "prompt_tokens", "completion_tokens"]
            + ["queue_ms", "first_token_ms", "whole_ms"]
        )
    ] * 3
    first, second, third = lines
    assert (first["adapter"], first["namespace"], first["status"]) == ("poems/live", "ann", 200)
    assert (first["completion_tokens"], second["request_id"], second["route"]) == (3, "mine-1", "/v1/chat/completions")
    assert 0 <= first["queue_ms"] <= first["first_token_ms"] <= first["whole_ms"]
    assert (third["status"], third["completion_tokens"], third["queue_ms"]) == (404, None, None)
    assert "cat" not in json.dumps(lines)


def test_quick_requests_have_none_and_who_leaves_has_what_it_came_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kilotune.serve")
    with serving(tmp_path, delay=0.05, slow_request=0.5) as running:
        assert ask(running, "ann").status_code == 200
        body = {**ASK, "prompt": [5], "max_tokens": 50, "stream": True}
        with (
            running.client(running.keys["ann"]) as client,
            client.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.iter_lines()  # held: a stream ends with it
            next(lines)
            time.sleep(0.7)
        wait_for(lambda: any(one.getMessage() == "slow request" for one in caplog.records))
    (line,) = [vars(one)["fields"] for one in caplog.records if one.getMessage() == "slow request"]
    assert line["status"] == 499
    assert 5 < line["completion_tokens"] < 50
    assert line["whole_ms"] >= 500


# -- the end of a process ----------------------------------------------------------------------------


@pytest.mark.full
def test_a_process_that_ends_takes_connections_until_its_answers_are_done(tmp_path: Path) -> None:
    base = slow_base(tmp_path / "base", "generate")
    more = ("--name", "base", "--set", "drain_seconds=60", "--slow-request", "0.5")
    with process(base, base / "adapters.db", tmp_path, *more) as served:
        body = {"model": "base", "prompt": [5], "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx2.get(f"{served.url}/ready").status_code == 503)
            ready, health = httpx2.get(f"{served.url}/ready"), httpx2.get(f"{served.url}/health")
            late = httpx2.post(f"{served.url}/v1/completions", json={**body, "stream": False}, timeout=30)
            headers = {"Authorization": f"Bearer {served.document['manager_key']}"}
            put = httpx2.post(f"{served.url}/manage/drain", headers=headers)
            seen = httpx2.get(f"{served.url}/manage", headers=headers)
            assert served.process.poll() is None
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]", "what ran came to its end"
        assert "error" not in rest[-2]
        assert (ready.json(), health.json(), health.status_code) == ({"status": "draining"}, {"status": "ok"}, 200)
        for refusal in (late, put):
            assert error(refusal, 503)["code"] == "unavailable"
            assert int(refusal.headers["retry-after"]) > 0
            assert refusal.headers["connection"] == "close"
        assert seen.json()["draining"] is True
        assert served.process.wait(20) == 0
        slow = [line for line in served.lines() if line["event"] == "slow request"]
        assert [line["completion_tokens"] for line in slow] == [60]


@pytest.mark.parametrize(("notice", "drain"), [(0.0, 30.0), (5.0, 30.0), (5.0, 0.0)])
@pytest.mark.parametrize("running", [False, True])
def test_it_ends_no_sooner_than_a_balancer_has_read_it(
    monkeypatch: pytest.MonkeyPatch, notice: float, drain: float, running: bool
) -> None:
    """On a clock of the test's own, with nothing that runs, and with something that never ends."""
    now, since = [1000.1], 1000.1
    monkeypatch.setattr(http_process, "time", SimpleNamespace(monotonic=lambda: now[0]))
    server = http_process._Server(uvicorn.Config(lambda: None))
    server.drain_seconds, server.notice_seconds = drain, notice
    server.service = told = SimpleNamespace(  # type: ignore[assignment]
        leaving=False, draining=False, ending=False, gate=SimpleNamespace(count=0)
    )
    server.server_state.tasks = {None} if running else set()  # type: ignore[arg-type]
    assert asyncio.run(server.on_tick(1)) is False
    server.handle_exit(signal.SIGTERM, None)
    assert (told.leaving, told.draining, told.ending) == (True, not notice, not notice)
    while not asyncio.run(server.on_tick(1)):
        assert told.draining == told.ending == (now[0] >= since + notice)
        now[0] += 0.1
    assert told.draining
    assert now[0] - since == pytest.approx(notice + (drain if running else 0.0), abs=0.11)


def test_asked_again_it_ends_within_its_notice() -> None:
    server = http_process._Server(uvicorn.Config(lambda: None))
    server.drain_seconds, server.notice_seconds = 60.0, 60.0
    server.service = told = SimpleNamespace(leaving=False, draining=False, ending=False)  # type: ignore[assignment]
    server.handle_exit(signal.SIGTERM, None)
    assert (told.leaving, told.draining, server.should_exit) == (True, False, False)
    server.handle_exit(signal.SIGTERM, None)
    assert (told.draining, told.ending, server.should_exit, server.force_exit) == (True, True, True, True)


@pytest.mark.heavy
def test_within_its_notice_a_process_answers_and_is_not_ready(tmp_path: Path) -> None:
    more = ("--name", "base", "--set", "notice_seconds=60")
    with process(base_folder(), tmp_path / "adapters.db", tmp_path, *more) as served:
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx2.get(f"{served.url}/ready").status_code == 503)
        assert httpx2.get(f"{served.url}/ready").json() == {"status": "draining"}
        assert complete(served.url, "any", "base").status_code == 200
        assert served.process.poll() is None
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(20)


@pytest.mark.full
def test_what_runs_is_cut_off_in_the_end_and_a_second_signal_does_so_at_once(tmp_path: Path) -> None:
    base = slow_base(tmp_path / "base", "generate")
    for drain, again in (("1", False), ("60", True)):
        more = ("--name", "base", "--set", f"drain_seconds={drain}")
        with process(base, base / "adapters.db", tmp_path, *more) as served:
            body = {"model": "base", "prompt": [5], "max_tokens": 900, "ignore_eos": True, "stream": True}
            with httpx2.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                served.process.send_signal(signal.SIGTERM)
                if again:
                    wait_for(lambda: httpx2.get(f"{served.url}/ready").status_code == 503)
                    served.process.send_signal(signal.SIGTERM)
                else:
                    rest = [line for line in lines if line]
                    assert "the service is ending" in rest[-2]
                served.process.wait(20)
