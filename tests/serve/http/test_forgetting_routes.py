"""Who may have whom forgotten, and what is told of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kilotune.serve.http.logs import NAME
from tests.support.feedback_support import SPACE, answer, feedback_serving, rules
from tests.support.http_support import Running
from tests.support.training_support import chat_lines, upload


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with feedback_serving(tmp_path) as (found, _):
        rules(found)
        yield found


def asked(running: Running, key: str, method: str, path: str, **more: Any) -> tuple[int, Any]:
    with running.client(key) as client:
        answered = client.request(method, path, **more)
        return answered.status_code, answered.json()


def done(running: Running, key: str, path: str) -> Any:
    end = time.monotonic() + 30
    while (found := asked(running, key, "GET", path)[1])["status"] != "done":
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def rated(running: Running, who: str) -> str:
    """The id of feedback of a user's."""
    kept = answer(running, who).feedback_id
    status, made = asked(running, running.keys[who], "POST", "/v1/feedback", json={"answer": kept, "rating": "up"})
    assert status == 200, made
    return str(made["id"])


def test_a_manager_has_a_person_forgotten(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    rated(running, "ann")
    others = rated(running, "bob")
    file = upload(running.openai("bob"), chat_lines([("the cat", "a dog sat")]))
    with caplog.at_level(logging.INFO, NAME):
        status, made = asked(running, running.manager, "POST", f"/manage/{SPACE}/forget", json={"user": "ann"})
        assert (status, made["status"], made["object"]) == (202, "queued", "forgetting")
        found = done(running, running.manager, f"/manage/{SPACE}/forget/{made['id']}")
    assert found["finished_at"] >= found["created_at"]
    assert found["counts"]["jobs"] == 0
    assert "ann" not in json.dumps([record.__dict__.get("fields") for record in caplog.records])
    assert asked(running, running.keys["ann"], "GET", "/v1/feedback")[1]["data"] == []
    assert [one["id"] for one in asked(running, running.keys["bob"], "GET", "/v1/feedback")[1]["data"]] == [others]
    assert running.openai("bob").files.retrieve(file.id).id == file.id


def test_a_person_may_ask_for_it(running: Running) -> None:
    rated(running, "bob")
    file = upload(running.openai("bob"), chat_lines([("the cat", "a dog sat")]))
    status, made = asked(running, running.keys["bob"], "DELETE", "/v1/feedback")
    assert status == 202, made
    found = done(running, running.keys["bob"], f"/v1/feedback/forget/{made['id']}")
    assert found["counts"]["files"] == 1
    assert asked(running, running.keys["bob"], "GET", f"/v1/files/{file.id}")[0] == 404
    assert asked(running, running.keys["bob"], "GET", "/v1/feedback")[1]["data"] == []
    stranger = running.keys["stranger"]
    assert asked(running, stranger, "GET", f"/v1/feedback/forget/{made['id']}")[0] == 404


@pytest.mark.parametrize(
    ("who", "method", "path", "body", "status", "word"),
    [
        ("manager", "POST", "forget", {"user": " ann"}, 400, "without blanks"),
        ("manager", "POST", "forget", {"users": ["ann"]}, 400, "user"),
        ("manager", "GET", "forget/forget-nobody", None, 404, "nobody is forgotten"),
        ("ann", "POST", "forget", {"user": "bob"}, 403, "manager"),
        ("plain", "DELETE", None, None, 403, "no single one's"),
    ],
)
def test_what_is_refused(
    running: Running, who: str, method: str, path: str | None, body: Any, status: int, word: str
) -> None:
    place = "/v1/feedback" if path is None else f"/manage/{SPACE}/{path}"
    key = running.manager if who == "manager" else running.keys[who]
    found, told = asked(running, key, method, place, **({} if body is None else {"json": body}))
    assert found == status, told
    assert word in told["error"]["message"]


def test_where_nothing_learns_there_is_nobody_to_forget(running: Running) -> None:
    training, running.service.training = running.service.training, None
    try:
        status, told = asked(running, running.manager, "POST", f"/manage/{SPACE}/forget", json={"user": "ann"})
    finally:
        running.service.training = training
    assert status == 404
    assert "--learn" in told["error"]["message"]


def test_logs_and_metrics_name_no_users_model(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "personal:ann/3", "prompt": "a"}
    with caplog.at_level(logging.INFO, NAME):
        asked(running, running.keys["plain"], "POST", "/v1/completions", json=body)
        asked(running, running.manager, "GET", f"/manage/{SPACE}/adapters/personal:ann")
        end = time.monotonic() + 10
        while not (told := [fields for fields in told_of(caplog) if "adapters" in fields["path"]]):
            assert time.monotonic() < end
            time.sleep(0.005)
    assert told[0]["path"] == f"/manage/{SPACE}/adapters/personal"
    assert "personal:" not in json.dumps(told_of(caplog))
    metrics = running.service.metrics
    assert metrics.of_adapter(SPACE, "personal:ann") == metrics.of_adapter(SPACE, "personal:bob")


def told_of(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record.__dict__["fields"] for record in caplog.records if record.getMessage() == "request"]
