"""From a correction over HTTP to the user's own answer, and back; of several users at once, and nobody else's."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.feedback_support import answer, feedback_serving, rules
from tests.support.http_support import BASE
from tests.support.training_support import said


def until(true: Callable[[], bool], told: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, told()
        time.sleep(0.05)


@pytest.mark.heavy
def test_each_user_gets_what_they_taught_until_they_take_it_back(tmp_path: Path) -> None:
    taught = {"ann": "a dog sat", "bob": "on the hat"}
    with feedback_serving(tmp_path) as (running, _):
        rules(running, pause_seconds=0)
        before = said(running.openai("plain"), BASE, "the cat")
        given = {}
        for who, text in taught.items():
            body = {"answer": answer(running, who, model="personal").feedback_id, "correction": text}
            given[who] = running.openai(who).post("/feedback", body=body, cast_to=object)["id"]

        def events(who: str) -> list[Any]:
            found: Any = running.openai(who).get("/feedback/events", cast_to=object)
            return list(found["data"])

        def answers(who: str) -> str:
            return said(running.openai(who), "personal", "the cat").strip()

        for who, text in taught.items():
            until(lambda who=who, text=text: answers(who) == text, lambda who=who: events(who))
            assert [one["type"] for one in events(who)] == ["learned"]
        assert said(running.openai("plain"), BASE, "the cat") == before
        running.openai("ann").delete(f"/feedback/{given['ann']}", cast_to=object)
        until(lambda: answers("ann") == before.strip(), lambda: events("ann"))
        assert answers("bob") == taught["bob"]
        back: Any = running.openai("bob").post("/feedback/rollback", cast_to=object)
        assert back == {"model": "personal:bob", "version": None}
        assert answers("bob") == before.strip()
