"""The guard's questions: none of what the benchmark asks, looked at once, and held to in each step by passes apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kilotune.serve.learning.guard
from kilotune.serve.learning.guard import Guard, Guarded
from kilotune.serve.learning.workers import LeftError
from tests.support.learning_support import Learning
from tests.support.training_support import CONFIG

ROOT = Path(__file__).parents[3]
GUARD = Path(kilotune.serve.learning.guard.__file__).with_name("guard.jsonl")


@pytest.fixture(scope="module")
def guard(school: Learning) -> Guarded:
    return school.runner.guard.over(school.space, None)


def test_the_guard_has_none_of_the_benchmarks_questions() -> None:
    asked = [json.loads(line)["asked"] for line in GUARD.read_text(encoding="utf-8").splitlines()]
    lines = (ROOT / "benchmarks" / "corrections.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    others = {text for one in told for text in (one.get("question"), one.get("control"), *one.get("paraphrases", ()))}
    assert len(set(asked)) == len(asked)
    assert not others & set(asked)


def test_it_is_looked_at_once_for_all(school: Learning, guard: Guarded) -> None:
    passes = school.learner.stats().passes
    guard.ready(school.learner, school.space, CONFIG, None)
    once = school.learner.stats().passes
    assert once - passes >= len(guard.study) + len(guard.gate)
    guard.ready(school.learner, school.space, CONFIG, None)
    assert school.learner.stats().passes == once
    assert school.runner.guard.over(school.space, None) is guard
    for row in guard.study:
        logprobs, ids = guard.said(row)
        places = sum(label != -100 for label in row["labels"])
        assert logprobs.shape == (places, ids.shape[1] + 1)
        assert logprobs.exp().sum(1).tolist() == pytest.approx([1.0] * places, abs=1e-5)


def test_a_look_that_was_left_is_gone_on_with(school: Learning) -> None:
    held = school.runner.guard.over(school.space, None)
    fresh = Guarded(held.study, held.gate)

    asked: list[int] = []

    def leave() -> None:
        asked.append(1)
        if len(asked) == 10:
            raise LeftError

    with pytest.raises(LeftError):
        fresh.ready(school.learner, school.space, CONFIG, None, leave)
    assert school.learner.stats().models == 0
    before = school.learner.stats().passes
    fresh.ready(school.learner, school.space, CONFIG, None, leave)
    assert school.learner.stats().passes - before == len(held.study) + len(held.gate) - 9
    held.ready(school.learner, school.space, CONFIG, None)
    for row in held.study:
        torch.testing.assert_close(fresh.said(row).logprobs, held.said(row).logprobs, rtol=0, atol=0)


def test_who_has_to_leave_waits_for_no_answers(school: Learning) -> None:
    asked: list[int] = []

    def leave() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise LeftError

    guard = Guard(school.make, school.engine)
    with pytest.raises(LeftError):
        guard.over(school.space, None, leave)
    assert len(asked) < 40
    assert guard.over(school.space, None).study  # and another one begins anew
