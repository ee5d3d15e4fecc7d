"""What is wrong is told in OpenAI's shape, with what to do; and nobody sees, names or times another's adapters."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from kilotune.errors import AdapterError, ConfigError, StoreError
from kilotune.fleet.store.sqlite import SqliteLink
from kilotune.serve.http.keys import Keyring, add_key, digest, read_keys, remove_key
from kilotune.serve.http.settings import ServeSettings
from tests.support.http_support import BASE, Running, serving

GOOD: dict[str, Any] = {"model": "poems", "prompt": "the cat", "max_tokens": 2, "temperature": 0}
CHAT: dict[str, Any] = {"model": "poems", "messages": [{"role": "user", "content": "a dog"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}
SHAPE = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("serve"), max_body=20_000, max_choices=8) as made:
        yield made


@pytest.fixture
def ann(running: Running) -> Iterator[httpx2.Client]:
    with running.client(running.keys["ann"]) as client:
        yield client


def error(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which must have this status and OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    found = answer.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == SHAPE
    told: dict[str, Any] = found["error"]
    return told


# -- requests that are wrong -------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"temperature": "warm"}, "temperature", "valid number, got 'warm'"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"max_tokens": 0}, "max_tokens", "0 only with echo"),
    ({"max_tokens": 5.5}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 5000}, "max_tokens", "at most 4096"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 9}, "n", "at most 8"),
    ({"prompt": ["a"] * 3, "n": 3}, "n", "9 answers asked for"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": [""]}, "stop[0]", "at least 1"),
    ({"prompt": []}, "prompt", "at least 1"),
    ({"prompt": 7}, "prompt", "prompt"),
    ({"prompt": [5, 100_000]}, "prompt", "token 100000; the model has 96"),
    ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
    ({"prompt": "the cat " * 100}, "prompt", "takes 64 tokens"),
    ({"prompt": "the cat", "max_tokens": 63}, "prompt", "63 more are asked for"),
    ({"prompt": ""}, "prompt", "is empty"),
    ({"prompt": "\ud800"}, "prompt", "unicode"),
    ({"best_of": 4}, "best_of", "best_of"),
    ({"suffix": "the end"}, "suffix", 'suffix: not served; taken is "" or null'),
    ({"echo": 1, "logprobs": 1}, "echo", "boolean"),
    ({"echo": True, "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream"),
    ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.01"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    ({"logit_bias": {"96": 3.0}}, "logit_bias", "token 96; the model has 96"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
    ({"logit_bias": {"05": 1}}, "logit_bias.05", "match pattern"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
    ({"max_token": 3}, "max_token", "Did you mean 'max_tokens'?"),
    ({"max_completion_tokens": 3}, "max_completion_tokens", "Did you mean 'max_tokens'?"),
    ({"Model": "x"}, "Model", "Model: there is no such option. Did you mean 'model'?"),
    ({"int": 3}, "int", "int: there is no such option"),
    ({"model": ""}, "model", "at least 1"),
    ({"model": None}, "model", "valid string"),
    ({"temperature": -1, "top_p": 9, "seed": "x"}, "seed", "temperature"),
    ({"timeout": 0}, "timeout", "greater than 0"),
]


@pytest.mark.parametrize(("change", "param", "part"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_named(ann: httpx2.Client, change: dict[str, Any], param: str, part: str) -> None:
    answer = ann.post(
        "/v1/completions", content=json.dumps({**GOOD, **change}), headers={"content-type": "application/json"}
    )
    told = error(answer, 400)
    assert part in told["message"], told
    assert (told["param"] or "") == param
    assert told["type"] == "invalid_request_error"


CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content: is missing"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0]"),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
        "tools[0].function: is missing",
    ),
    ({"top_logprobs": 2}, "top_logprobs: only with logprobs"),
    ({"max_completion_tokens": 4}, "max_tokens: the old name"),
    (
        {"response_format": {"type": "json"}},
        'response_format.type: "json" is not served; taken is "text", "json_obj',
    ),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: is missing"),
    ({"messages": [{"role": "assistant", "refusal": "no"}]}, "messages[0].refusal: not served"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message: not together"),
    ({"prompt": "x"}, "prompt: there is no such option"),
]


@pytest.mark.parametrize(("change", "part"), CHATS, ids=lambda value: str(value)[:40])
def test_a_wrong_chat_is_told_what_is_wrong(ann: httpx2.Client, change: dict[str, Any], part: str) -> None:
    assert part in error(ann.post("/v1/chat/completions", json={**CHAT, **change}), 400)["message"]


NEUTRAL: list[dict[str, Any]] = [
    {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "suffix": "", "best_of": 1, "user": "u"},
    {"presence_penalty": None, "logit_bias": None, "stop": None, "seed": None, "n": None, "stream": None, "echo": None},
    {"stop": [], "stop_token_ids": [], "temperature": 2, "top_p": 1},
]


@pytest.mark.parametrize("change", NEUTRAL)
def test_what_changes_nothing_is_taken(ann: httpx2.Client, change: dict[str, Any]) -> None:
    assert ann.post("/v1/completions", json={**GOOD, **change}).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "part"),
    [
        (b"{", "application/json", "the body is no JSON"),
        (b'{"prompt": "\xff"}', "application/json", "not in UTF-8, at byte"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", "too many digits"),
        (b'{"model": NaN, "prompt": "x"}', "application/json", "model"),
        (b"", "application/json", "the body: is missing"),
        (b"[]", "application/json", "the body"),
        (b"null", "application/json", "the body"),
        (b"[" * 5000, "application/json", "nested too deeply"),
    ],
)
def test_a_body_that_is_no_request(ann: httpx2.Client, body: bytes, kind: str, part: str) -> None:
    told = error(ann.post("/v1/completions", content=body, headers={"content-type": kind}), 400)
    assert part in told["message"]


@pytest.mark.parametrize(
    ("headers", "part"),
    [
        ({"content-type": "text/plain"}, "expected application/json, got 'text/plain'"),
        ({}, "expected application/json, got ''"),
        ({**JSON, "content-encoding": "gzip"}, "'gzip' is not taken"),
    ],
)
def test_a_body_of_another_kind(ann: httpx2.Client, headers: dict[str, str], part: str) -> None:
    told = error(ann.post("/v1/completions", content=json.dumps(GOOD).encode(), headers=headers), 415)
    assert part in told["message"]
    assert told["code"] == "unsupported_media_type"


def test_a_body_that_is_too_large(ann: httpx2.Client) -> None:
    for content in (b"x" * 20_001, iter([b"x" * 15_000, b"x" * 15_000])):
        told = error(ann.post("/v1/completions", content=content, headers={"content-type": "application/json"}), 413)
        assert "20000 bytes" in told["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("DELETE", "/v1/completions", 405)]
)
def test_places_that_are_not_there(ann: httpx2.Client, method: str, path: str, status: int) -> None:
    assert path in error(ann.request(method, path), status)["message"]


def test_an_encoders_routes_say_what_the_base_is_for(ann: httpx2.Client) -> None:
    for path in ("/v1/embeddings", "/v1/classify"):
        assert BASE in error(ann.post(path, json={"model": BASE, "input": "a"}), 400)["message"]


# -- who asks ----------------------------------------------------------------------------------------


def test_without_a_valid_key_nothing_is_told(running: Running) -> None:
    paths = ["/v1/models", "/v1/nothing", "/v1/completions", "/manage", "/metrics", "/manage/ann/adapters", "/x"]
    for headers in (
        {},
        {"Authorization": "Bearer kt-wrong"},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer"},
    ):
        with httpx2.Client(base_url=running.url, headers=headers) as client:
            texts = {json.dumps(error(client.get(path), 401)) for path in paths}
        assert len(texts) == 1, "the same for what is there and what is not"
    with (
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="kt-wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_a_key_is_for_its_role_only(running: Running) -> None:
    wrong = {
        running.keys["ann"]: ["/manage", "/manage/ann/adapters", "/metrics"],
        running.manager: ["/v1/models", "/v1/completions"],
        running.monitor: ["/v1/models", "/manage"],
    }
    for key, paths in wrong.items():
        with running.client(key) as client:
            for path in paths:
                assert "this key is a" in error(client.get(path), 403)["message"]
    with running.client(running.monitor) as client:
        assert client.get("/metrics").status_code == 200


def test_keys_are_kept_as_hashes_and_a_change_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first, kept = add_key(path, "tenant", "ann", "her laptop")
    assert first not in path.read_text()
    assert kept.sha256 == digest(first)
    assert path.stat().st_mode & 0o077 == 0
    ring = Keyring(path)
    assert ring.find(first) == kept
    assert ring.find(None) is None
    second, other = add_key(path, "manager", None)
    ring._looked -= 5
    assert ring.find(second) == other
    remove_key(path, kept.id)
    ring._looked -= 5
    assert ring.find(first) is None
    path.write_text("{ not json")
    ring._looked -= 5
    assert ring.find(second) == other, "a file that is being changed badly takes nobody's key away"
    assert "is no file of keys" in str(ring.trouble)


def test_keys_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for role, space, part in (
        ("king", "ann", "one of"),
        ("tenant", None, "one namespace"),
        ("monitor", "a", "whole"),
        ("tenant", "a/b", "namespace"),
    ):
        with pytest.raises((ConfigError, AdapterError), match=part):
            add_key(path, role, space)
    assert not path.exists()
    with pytest.raises(ConfigError, match="there is no file of keys"):
        read_keys(path)
    path.write_text('{"format": 1, "keys": [{"id": "a"}]}')
    with pytest.raises(ConfigError, match="is no file of keys"):
        read_keys(path)
    path.unlink()
    _, kept = add_key(path, "tenant", "ann")
    with pytest.raises(ConfigError, match=f"has no key '{kept.id[:-1]}'. Did you mean '{kept.id}'"):
        remove_key(path, kept.id[:-1])


# -- tenants -----------------------------------------------------------------------------------------


def test_nearest_names_are_ones_own_only(ann: httpx2.Client, running: Running) -> None:
    told = error(ann.post("/v1/completions", json={**GOOD, "model": "poem"}), 404)
    assert "Did you mean 'poems'?" in told["message"]
    assert (told["code"], told["param"]) == ("model_not_found", "model")
    for name in ("secret-plan", "secret-plans", "secret-plans/1", "secret-plans/live"):
        assert "Did you mean" not in error(ann.post("/v1/completions", json={**GOOD, "model": name}), 404)["message"]
    with running.client(running.keys["bob"]) as bob:
        told = error(bob.post("/v1/completions", json={**GOOD, "model": "secret-plan"}), 404)
        assert "Did you mean 'secret-plans'?" in told["message"]


def test_versions_and_aliases_that_are_not_there(ann: httpx2.Client) -> None:
    for name, part in (
        ("poems/2", "no version 2"),
        ("poems/liv", "Did you mean 'live'?"),
        ("poems/", ""),
        ("po/ems/1", ""),
    ):
        told = error(ann.post("/v1/completions", json={**GOOD, "model": name}), 404)
        assert part in told["message"]


HOSTILE = [
    "../bob/secret-plans", "bob/secret-plans", "secret-plans' OR '1'='1", "%", "_", "*", "secret*",
    "bob\x00secret-plans", "\u202esnalp-terces", "a" * 399, "poems/1; DROP TABLE kilotune_names",
    "ann/../bob/secret-plans", "🦀", "POEMS", "poems ",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_reach_nothing(ann: httpx2.Client, name: str) -> None:
    told = error(ann.post("/v1/completions", json={**GOOD, "model": name}), 404)
    assert "plans" not in told["message"].replace(repr(name), "").replace(name, "")
    assert "Did you mean" not in told["message"] or "'poems'" in told["message"] or "'letters'" in told["message"]
    answer = ann.get("/v1/models/" + "".join(f"%{byte:02x}" for byte in name.encode()))
    assert answer.status_code == 404


def test_the_lists_of_tenants_do_not_overlap(ann: httpx2.Client, running: Running) -> None:
    for query in ({}, {"after": "a"}, {"after": "secret"}, {"limit": 1000}):
        assert "secret" not in ann.get("/v1/models", params=query).text
    assert "secret" not in ann.get("/v1/usage").text
    with running.client(running.keys["bob"]) as bob:
        assert bob.get("/v1/usage").json()["namespace"] == "bob"
        assert "poems" not in bob.get("/v1/models").text


def test_anothers_adapter_takes_the_same_statements_as_nobodys(
    running: Running, ann: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could be timed: the work done for a name of somebody else's, and for one that nobody has."""
    seen: list[str] = []
    for name in ("rows", "many_rows"):
        monkeypatch.setattr(SqliteLink, name, noting(getattr(SqliteLink, name), seen))
    done = []
    for name in ("secret-plans", "secret-plots"):
        seen.clear()
        error(ann.post("/v1/completions", json={**GOOD, "model": name}), 404)
        done.append([statement.replace("plans", "plots") for statement in seen])
    assert done[0] == done[1]
    assert len(done[0]) >= 2
    assert all("'ann'" in statement for statement in done[0]), "the namespace is a part of each"


def noting(original: Any, seen: list[str]) -> Any:
    def noted(self: Any, statement: str, values: Any = ()) -> Any:
        seen.append(f"{statement} {values}")
        return original(self, statement, values)

    return noted


@pytest.mark.full
def test_anothers_adapter_cannot_be_timed(running: Running) -> None:
    """Medians of many, taken in turns: within the noise of the same name asked twice."""
    names = ["secret-plans", "secret-plots", "secret-plans", "secret-plots"]
    times: list[list[float]] = [[] for _ in names]
    with running.client(running.keys["ann"]) as client:
        for _ in range(400):
            for place, name in enumerate(names):
                began = time.perf_counter()
                client.post("/v1/completions", json={**GOOD, "model": name})
                times[place].append(time.perf_counter() - began)
    middle = [statistics.median(values) for values in times]
    noise = max(abs(middle[0] - middle[2]), abs(middle[1] - middle[3]), 0.02 * middle[0])
    assert abs(statistics.mean(middle[::2]) - statistics.mean(middle[1::2])) < 3 * noise


# -- the store, the disk, the log --------------------------------------------------------------------


def test_a_store_that_is_away_is_told_to_come_again(running: Running, ann: httpx2.Client) -> None:
    running.catalogue.away = StoreError("cannot reach the server db7.internal:5432")
    try:
        answer = ann.post("/v1/completions", json=GOOD)
        told = error(answer, 503)
        assert told["code"] == "store_unavailable"
        assert "db7" not in answer.text, "where it is, is not for tenants"
        assert int(answer.headers["retry-after"]) >= 1
        assert ann.post("/v1/completions", json={**GOOD, "model": BASE}).status_code == 200, "the base needs no store"
        assert ann.get("/ready").status_code == 200
    finally:
        running.catalogue.away = None
    assert ann.post("/v1/completions", json=GOOD).status_code == 200


def test_an_adapter_that_is_lost_or_broken_fails_its_own_requests(running: Running, ann: httpx2.Client) -> None:
    plain = running.engine._adapter
    for fault, status in ((AdapterError("it went away"), 404), (RuntimeError("internal detail"), 500)):

        def broken(key: Any, fault: Exception = fault) -> Any:
            if key is not None:
                raise fault
            return plain(key)

        running.engine._adapter = broken
        try:
            for stream in (False, True):
                told = error(ann.post("/v1/completions", json={**GOOD, "stream": stream}), status)
                assert "internal detail" not in told["message"]
            assert ann.post("/v1/completions", json={**GOOD, "model": BASE}).status_code == 200
        finally:
            running.engine._adapter = plain


def test_a_request_id_is_taken_and_given_back(ann: httpx2.Client) -> None:
    assert ann.get("/v1/models", headers={"X-Request-Id": "mine-7"}).headers["x-request-id"] == "mine-7"
    ids = {
        ann.get("/v1/models", headers={"X-Request-Id": given}).headers["x-request-id"] for given in ("a b", "x" * 200)
    }
    assert len(ids) == 2
    assert all(len(one) == 32 for one in ids)


def test_the_log_has_a_line_for_each_request_and_no_prompt(
    ann: httpx2.Client, caplog: pytest.LogCaptureFixture
) -> None:
    from kilotune.serve.http.logs import JsonLines, pseudonym

    with caplog.at_level(logging.INFO, "kilotune.serve"):
        ann.post(
            "/v1/completions", json={**GOOD, "prompt": "the blue house", "user": "u7"}, headers={"X-Request-Id": "r-1"}
        )
        ann.post("/v1/completions", json={**GOOD, "model": "nothing"})
        while len(caplog.records) < 2:  # the line is written once the answer is out
            time.sleep(0.005)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records]
    first, second = [line for line in lines if line["event"] == "request"]
    assert (first["request_id"], first["status"], first["namespace"], first["model"]) == ("r-1", 200, "ann", "poems")
    assert first["user"] == pseudonym("u7") != pseudonym("u8")  # which forgetting a person need not reach
    assert "u7" not in json.dumps(lines)
    assert first["completion_tokens"] == 2
    assert first["prompt_tokens"] > 1
    assert first["first_token_ms"] > 0
    assert (second["status"], second["error"]) == (404, "model_not_found")
    assert "blue" not in json.dumps(lines)


# -- without keys ------------------------------------------------------------------------------------


def test_without_keys_it_is_open_to_this_machine_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --keys"):
        ServeSettings(host="0.0.0.0")
    ring = Keyring(None, (), "ann")
    options: dict[str, Any] = {"ring": (ring, {"ann": ""}, "", ""), "keys": None, "namespace": "ann"}
    with serving(tmp_path, **options) as running, httpx2.Client(base_url=running.url) as client:
        assert client.post("/v1/completions", json=GOOD).status_code == 200
        assert client.get("/manage").status_code in (401, 403), "managing always needs a key"
        told = error(client.post("/v1/completions", json=GOOD, headers={"Host": "evil.example"}), 403)
        assert "evil.example" in told["message"]
        error(client.post("/v1/completions", content=json.dumps(GOOD), headers={"content-type": "text/plain"}), 415)
