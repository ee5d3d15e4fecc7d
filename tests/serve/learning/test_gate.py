"""The gate on planted candidates: floods of wrong labels, collapse, numbers that are none; and on good ones."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from kilotune.fleet.stepper.adam import Adam
from kilotune.fleet.stepper.objectives import Divergence, Likely
from kilotune.fleet.stepper.operations import Forward, ForwardBackward, OptimStep
from kilotune.serve.learning.feedback import Lesson
from kilotune.serve.learning.gate import Bounds, Gate, Verdict
from kilotune.serve.learning.guard import Guarded, said_by
from kilotune.serve.learning.lessons import Taught, read_lessons
from kilotune.serve.learning.study import Pace, Study, correction_scores
from tests.support.learning_support import Learning, texts
from tests.support.training_support import CONFIG

CAREFUL = Pace(rate=0.5, steps=12, guard=2.0, guarded=2, reworded=0)  # so small a base has no room for other words
PLANTED = Adam(rate=5e-2)


@pytest.fixture(scope="module")
def guard(school: Learning) -> Guarded:
    made = school.runner.guard.over(school.space, None)
    made.ready(school.learner, school.space, CONFIG, None)
    return made


def corrections(school: Learning, pairs: Sequence[tuple[str, str]]) -> list[Taught]:
    lessons = [
        Lesson(
            name=f"l{number}",
            user="ann",
            kind="correction",
            messages=[{"role": "user", "content": asked}],
            tools=None,
            answer="no",
            better=right,
            rating=None,
            model="base",
            version=None,
            created=0.0,
        )
        for number, (asked, right) in enumerate(pairs)
    ]
    return read_lessons(lessons, school.make, school.runner.guard.texts)[0]


@contextmanager
def model(school: Learning, seed: int = 0) -> Iterator[str]:
    name = uuid.uuid4().hex
    school.learner.open(name, school.space, CONFIG, seed=seed)
    try:
        yield name
    finally:
        school.learner.close(name)


def planted(school: Learning, name: str, rows: Sequence[Any], steps: int, how: Adam = PLANTED) -> None:
    """Learn rows as nobody should: with no replay, and no guard."""
    for step in range(steps):
        batch = [rows[(4 * step + i) % len(rows)] for i in range(4)]
        school.learner.submit(name, ForwardBackward(batch))
        school.learner.submit(name, OptimStep(how)).result()


def judged(
    school: Learning, guard: Guarded, known: Sequence[Taught], fresh: Sequence[Taught], change: Callable[[str], None]
) -> Verdict:
    """What the gate says of a model that knew something, after a change of it."""
    with model(school) as name:
        if known:
            Study(school.learner, name, CONFIG, known, [], guard, CAREFUL, lambda: None).run()
        gate = Gate(school.learner, name, bool(known), fresh, known, guard, Bounds())
        change(name)
        return gate.judge()


def test_what_has_not_changed_is_as_it_was(school: Learning, guard: Guarded) -> None:
    found = judged(school, guard, [], [], lambda _: None)
    assert found.passed
    assert found.measured["kl"] == pytest.approx(0, abs=1e-6)
    assert found.measured["held_out"] == pytest.approx(found.measured["held_out_live"], abs=1e-5)
    fresh = corrections(school, [("the cat", "a dog sat")])
    assert "the loss on the new corrections did not fall" in judged(school, guard, [], fresh, lambda _: None).faults[0]


def test_the_gates_numbers_are_those_of_plain_computations(school: Learning, guard: Guarded) -> None:
    rows = [one.rows[0] for one in corrections(school, [("the cat", "a dog sat")])]
    with model(school) as name:
        gate = Gate(school.learner, name, False, [], [], guard, Bounds())
        planted(school, name, rows, 3)
        found = gate.judge().measured
        losses = [loss for loss, _ in correction_scores(school.learner, name, guard.gate)]
        assert found["held_out"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        total = weight = 0.0
        for row in guard.gate:
            target = Likely.of(said_by(school.learner, name, row, without=True), 10**6)
            scored = school.learner.submit(name, Forward([row], Divergence((target,)))).result()
            total, weight = total + scored.loss, weight + scored.weight
        assert found["kl"] == pytest.approx(total / weight, rel=1e-3)


def test_a_collapse_to_one_token_is_refused(school: Learning, guard: Guarded) -> None:
    rows = [one.rows[0] for one in corrections(school, [(text, "cat") for text in texts(1, 20)])]
    token = rows[0]["labels"][-2]
    rows = [{**row, "labels": [-100, *([token] * (len(row["input_ids"]) - 1))]} for row in rows]
    found = judged(school, guard, [], [], lambda name: planted(school, name, rows, 20))
    assert any(fault.startswith("KL from what is live") for fault in found.faults), found


@pytest.mark.heavy
def test_a_flood_of_wrong_labels_is_refused(school: Learning, guard: Guarded) -> None:
    """What is known is taught otherwise, with labels drawn anew; the replayed rows and the guard both say so."""
    asked = texts(1, 8)
    known = corrections(school, list(zip(asked, texts(2, 8), strict=True)))
    wrong = corrections(school, [*zip(asked, texts(3, 8), strict=True), *zip(texts(4, 32), texts(5, 32), strict=True)])
    rows = [one.rows[0] for one in wrong]
    found = judged(school, guard, known, wrong, lambda name: planted(school, name, rows, 40))
    assert any(fault.startswith("the loss on earlier corrections rose") for fault in found.faults), found
    assert any("guard" in fault or "held-out" in fault for fault in found.faults), found


def test_numbers_that_are_none_are_refused(school: Learning, guard: Guarded) -> None:
    rows = [one.rows[0] for one in corrections(school, [("the cat", "a dog sat")])]

    def broken(name: str) -> None:
        planted(school, name, rows, 1, Adam(rate=1e38))

    assert judged(school, guard, [], [], broken).faults == ("its outputs are not finite",)


def test_each_bound_is_one_that_can_refuse(school: Learning, guard: Guarded) -> None:
    known = corrections(school, [("the cat", "a dog sat")])
    rows = [one.rows[0] for one in corrections(school, [("the cat", "on the hat")])]
    with model(school) as name:
        Study(school.learner, name, CONFIG, known, [], guard, CAREFUL, lambda: None).run()
        wide = Bounds(divergence=9, held_out=9, replayed=9)
        strict = [replace(wide, **{name: 0.0}) for name in ("divergence", "held_out", "replayed")] + [wide]
        gates = [Gate(school.learner, name, True, [], known, guard, bounds) for bounds in strict]
        planted(school, name, rows, 10)
        faults = [gate.judge().faults for gate in gates]
    starts = ("KL from", "the loss on held-out texts", "the loss on earlier corrections")
    assert [len(one) for one in faults] == [1, 1, 1, 0]
    assert all(one[0].startswith(start) for one, start in zip(faults, starts, strict=False))


@pytest.mark.heavy
def test_of_20_good_ones_19_pass(school: Learning, guard: Guarded) -> None:
    passed = []
    for number, (asked, right) in enumerate(zip(texts(1, 20), texts(2, 20), strict=True)):
        (fresh,) = corrections(school, [(asked, right)])

        def learn(name: str, one: Taught = fresh) -> None:
            Study(school.learner, name, CONFIG, [one], [], guard, CAREFUL, lambda: None).run()

        found = judged(school, guard, [], [fresh], learn)
        assert found.measured["fresh"] < found.measured["fresh_live"] - 1, number
        passed.append(found.passed)
    assert sum(passed) >= 19, passed
