"""A correction over HTTP, until it is the answer; taken back, until it is not; and the way back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kilotune.serve.http.settings import ServeSettings
from kilotune.serve.learning.training import TrainingLimits
from tests.support.feedback_support import asked, call, correct, feedback_serving, rules, wait_for
from tests.support.http_support import BASE, Running
from tests.support.learning_support import TOY, WIDE
from tests.support.training_support import said


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """One for each test: what one of them had learned would be another's start, in whatever order they run."""
    with feedback_serving(tmp_path, limits=TrainingLimits(pace=TOY, bounds=WIDE)) as (made, _):
        rules(made, pause_seconds=0)
        yield made


@pytest.mark.heavy
def test_a_correction_becomes_the_answer_and_when_taken_back_it_is_not(running: Running) -> None:
    base = said(running.openai("ann"), BASE, "the cat")
    assert asked(running, "ann", "the cat").message.content == base
    name = correct(running, "ann", "the cat", "a dog sat")
    event = wait_for(running, "ann", "learned")
    assert event["data"]["lessons"] == [name]
    assert asked(running, "ann", "the cat").message.content.strip() == "a dog sat"
    assert asked(running, "bob", "the cat").message.content == base
    assert said(running.openai("ann"), BASE, "the cat") == base
    assert call(running, "bob", "GET", "/v1/feedback/events").json()["data"] == []
    assert call(running, "ann", "DELETE", f"/v1/feedback/{name}").status_code == 200
    wait_for(running, "ann", "taken_back")
    assert asked(running, "ann", "the cat").message.content == base


@pytest.mark.heavy
def test_the_way_back(running: Running) -> None:
    base = said(running.openai("bob"), BASE, "a dog")
    refused = call(running, "bob", "POST", "/v1/feedback/rollback")
    assert refused.status_code == 409
    assert "nothing to go back from" in refused.json()["error"]["message"]
    correct(running, "bob", "a dog", "on the hat")
    wait_for(running, "bob", "learned")
    assert asked(running, "bob", "a dog").message.content.strip() == "on the hat"
    back = call(running, "bob", "POST", "/v1/feedback/rollback")
    assert (back.status_code, back.json()["version"]) == (200, None)
    assert asked(running, "bob", "a dog").message.content == base
    correct(running, "bob", "the mat", "a dog sat")  # what was gone back from is not learned with it
    assert len(wait_for(running, "bob", "learned", 2)["data"]["lessons"]) == 1


@pytest.mark.heavy
def test_it_is_counted(running: Running) -> None:
    correct(running, "bob", "a mat", "the cat")
    wait_for(running, "bob", "learned")
    with running.client(running.manager) as manager:
        lines = manager.get("/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if line.startswith("kilotune_"))
    counted = {name: float(value) for name, _, value in pairs}
    assert counted['kilotune_learning_runs_total{result="learned"}'] >= 1
    assert counted["kilotune_learning_corrections_total"] >= 1
    assert counted["kilotune_correction_seconds_total"] > 0


def test_what_says_how_to_learn_is_read(tmp_path: Any) -> None:
    from kilotune import VeraConfig
    from kilotune.serve.http.startup import _in_last_blocks
    from tests.support.serve_support import base_model

    assert ServeSettings(learn=True, learn_last_blocks=0, learn_kl=0.1, learn_threads=2).learn_last_blocks == 0
    config = VeraConfig(r=8, target_modules="all-linear")
    base = base_model()  # of two blocks
    assert _in_last_blocks(base, config, 0) is config
    assert _in_last_blocks(base, config, 2) is config
    for last in (None, 1):
        assert tuple(_in_last_blocks(base, config, last).layers_to_transform) == (1,)  # type: ignore[attr-defined]
