"""Feedback in a process that is killed: what was acknowledged is there afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.http.test_process import Served, process
from tests.support.cli_helpers import as_json
from tests.support.http_support import base_folder


@pytest.mark.full
def test_answers_and_what_was_said_of_them_survive_kills(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ann = as_json("keys", "add", path, "--namespace", "acme", "--user", "ann")["key"]
    manager = as_json("keys", "add", path, "--role", "manager", "--namespace", "acme")["key"]
    more = ["--keys", str(path), "--learn"]

    def ask(served: Served, method: str, place: str, key: str = ann, body: Any = None) -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        answered = httpx2.request(method, f"{served.url}{place}", json=body, headers=headers, timeout=30)
        assert answered.status_code == 200, answered.text
        return answered.json()

    with process(base_folder(), tmp_path / "a.db", tmp_path, *more) as served:
        ask(served, "PUT", "/manage/acme/feedback", manager, {"enabled": True, "pause_seconds": 3600})
        messages = [{"role": "user", "content": "the cat"}]
        chat = {"model": "personal", "messages": messages, "max_tokens": 4, "temperature": 0}
        (choice,) = ask(served, "POST", "/v1/chat/completions", body=chat)["choices"]
        served.process.kill()  # nothing more is written after the answer
    with process(base_folder(), tmp_path / "a.db", tmp_path, *more) as served:
        said = {"answer": choice["feedback_id"], "correction": "a dog sat"}
        made = ask(served, "POST", "/v1/feedback", body=said)
        served.process.kill()
    with process(base_folder(), tmp_path / "a.db", tmp_path, *more) as served:
        found = ask(served, "GET", f"/v1/feedback/{made['id']}")
        assert (found["messages"], found["better"]) == (messages, "a dog sat")
        assert found["content"] == choice["message"]["content"]
        ask(served, "DELETE", f"/v1/feedback/{made['id']}")
        served.process.kill()
    with process(base_folder(), tmp_path / "a.db", tmp_path, *more) as served:
        assert ask(served, "GET", "/v1/feedback")["data"] == []
