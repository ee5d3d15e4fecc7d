"""A run of learning: that what was known stays known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from kilotune.serve.learning import gate, study
from tests.support.learning_support import TOY, Learning, learning

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
