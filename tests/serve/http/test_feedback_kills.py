"""Feedback in a process that is killed: what was acknowledged is there afterwards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.serve.http.test_process import Served, process
from tests.support.cli_helpers import as_json
from tests.support.http_support import base_folder
from tests.support.training_support import chat_lines, done, said, upload


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


@pytest.mark.heavy
def test_two_tenants_teach_their_answers_by_a_job_and_by_feedback_through_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ann = as_json("keys", "add", path, "--namespace", "ann", "--trains")["key"]
    bob = as_json("keys", "add", path, "--namespace", "bob", "--user", "bob")["key"]
    manager = as_json("keys", "add", path, "--role", "manager")["key"]
    more = ["--keys", str(path), "--learn", "--set", "learn_method=lora", "--set", "learn_rank=8"]

    def client(served: Served, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=30)

    with process(base_folder(), tmp_path / "a.db", tmp_path, *more) as served:
        with client(served, ann) as hers, client(served, bob) as his:
            before = said(hers, "base", "the cat")
            rules = {"enabled": True, "pause_seconds": 0}
            place, headers = f"{served.url}/manage/bob/feedback", {"Authorization": f"Bearer {manager}"}
            assert httpx2.put(place, json=rules, headers=headers).status_code == 200
            hyper = {"n_epochs": 40, "batch_size": 2, "learning_rate_multiplier": 3.0}
            method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
            file = upload(hers, chat_lines([("the cat", "a dog sat")] * 2)).id
            job = hers.fine_tuning.jobs.create(model="base", training_file=file, method=method, seed=1)
            asked: Any = [{"role": "user", "content": "the cat"}]
            chat = his.chat.completions.create(model="personal", messages=asked, max_tokens=8, temperature=0)
            kept: Any = chat.choices[0]
            his.post("/feedback", body={"answer": kept.feedback_id, "correction": "on the hat"}, cast_to=object)
            time.sleep(0.3)  # both have begun
        served.process.kill()
    with (
        process(base_folder(), tmp_path / "a.db", tmp_path, *more) as served,
        client(served, ann) as hers,
        client(served, bob) as his,
    ):
        ended = done(hers, hers.fine_tuning.jobs.retrieve(job.id))
        assert ended.status == "succeeded", ended.error
        assert said(hers, ended.fine_tuned_model, "the cat").strip() == "a dog sat"
        end = time.monotonic() + 60
        while said(his, "personal", "the cat").strip() != "on the hat":
            assert time.monotonic() < end, his.get("/feedback/events", cast_to=object)
            time.sleep(0.1)
        learned: Any = his.get("/feedback/events", cast_to=object)
        assert [one["type"] for one in learned["data"]] == ["learned"]  # once
        assert said(hers, "base", "the cat") == said(his, "base", "the cat") == before
