"""A run of learning: that what was known stays known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kilotune.fleet.stepper.objectives import Likely
from kilotune.fleet.stepper.operations import OptimStep
from kilotune.serve.learning import gate, study
from kilotune.serve.learning.lessons import Taught
from tests.support.learning_support import TOY, Learning, learning
from tests.support.training_support import CONFIG

HASTY = replace(TOY, replay=0, sure=0.15, steps=80)  # no replay; so small a base is never surer


@pytest.fixture
def school(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Learning]:
    for module in (study, gate):
        monkeypatch.setattr(module, "GREEDY", HASTY.sure)
    with learning(tmp_path_factory.mktemp("study"), pace=HASTY) as made:
        yield made


TAUGHT = {"the cat": "a dog sat", "a dog": "on the hat", "the mat": "a cat sat"}


def taught(school: Learning) -> list[str]:
    """What came of the corrections, one after another."""
    found = []
    for question, answer in TAUGHT.items():
        school.correct("ann", question, answer)
        found.append(school.learn("ann")["type"])
    return found


def test_what_was_known_and_is_not_any_more_is_learned_again(school: Learning) -> None:
    assert taught(school) == ["learned"] * 3
    assert {question: school.said("ann", question) for question in TAUGHT} == TAUGHT


def test_without_that_it_is_forgotten(school: Learning, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test before this one says something."""
    monkeypatch.setattr(gate, "GREEDY", 2.0)  # so that nothing is held
    assert "refused" in taught(school)
    assert "earlier corrections" in school.last("ann")["message"]


@pytest.mark.parametrize(("likely", "surely"), [(0.0, False), (1.0, True)])
def test_a_correction_is_learned_until_other_words_have_its_answer_too(
    tmp_path_factory: pytest.TempPathFactory, likely: float, surely: bool
) -> None:
    """No answer of this base's has a probability of 1, so with that all steps are made."""
    with learning(tmp_path_factory.mktemp("likely"), pace=replace(HASTY, likely=likely)) as school:
        school.correct("ann", "the cat sat on a mat", "a dog")
        event = school.learn("ann")
        assert (event["data"]["steps"] == HASTY.steps) == surely, event
        assert school.said("ann", "the cat sat on a mat") == "a dog"


class Known:
    """In place of a learner: whether a row is known is told by its number and the steps that were made."""

    def __init__(self, known: Callable[[int, int], bool]) -> None:
        self.known, self.steps = known, 0

    def submit(self, model: str, operation: Any) -> Future[Any]:
        done: Future[Any] = Future()
        if isinstance(operation, OptimStep):
            self.steps += 1
            done.set_result(None)
            return done
        likely = [0.9 if self.known(row["input_ids"][1], self.steps) else 0.1 for row in operation.rows]
        done.set_result(SimpleNamespace(logprobs=[torch.full((2,), math.log(one)) for one in likely]))
        return done


def ran(known: Callable[[int, int], bool], held: int) -> study.Study:
    """One new correction (number 1), and so many that were known (from 100 on)."""

    def taught(number: int) -> Taught:
        row = {"input_ids": [0, number], "labels": [-100, number]}
        return Taught(f"{number:012x}", str(number), "correction", str(number), (row,))

    learner, old = Known(known), [taught(100 + number) for number in range(held)]
    row = {"input_ids": [0, 999], "labels": [-100, 999]}
    guard = SimpleNamespace(study=[row], said=lambda row: Likely.of(torch.zeros(1, 4).log_softmax(1)))
    run = study.Study(learner, "m", CONFIG, [taught(1)], old, guard, study.Pace(), lambda: None, old)  # type: ignore[arg-type]
    run.run()
    return run


def test_a_run_does_not_end_with_what_was_lost_meanwhile() -> None:
    """The new one is known after 5 steps; an old one is found forgotten then, and is learned while the new one goes."""

    def known(number: int, step: int) -> bool:
        if number == 1:
            return step in (5, 6) or step >= 12
        return step >= 8 if number == 100 else True

    run = ran(known, held=30)
    assert (run.steps, run.unlearnt()) == (12, [])
    assert ran(lambda number, step: number != 1 or step >= 5, held=30).steps == 5
