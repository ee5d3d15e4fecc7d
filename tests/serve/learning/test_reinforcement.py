"""What is learned from sampled answers: advantages, and draws that are the same whenever they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import pstdev
from typing import Any

import pytest

from kilotune.errors import UnsupportedError
from kilotune.serve.engine.interface import Finish, Item, Sampling, Token
from kilotune.serve.learning.reinforcement import EndedError, Practice
from kilotune.serve.learning.training_file import Example

GRADER = {
    "type": "text_similarity",
    "name": "like",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.answer }}",
    "evaluation_metric": "fuzzy_match",
}
EXAMPLES = [
    Example(line, ({"input_ids": [1, 2, line], "labels": [-100] * 3},), '{"answer": "abcd"}') for line in (3, 7)
]


class Scripted:
    """A learner whose model says what a script has for it."""

    longest = 64

    def __init__(self, script: Callable[[int, Sampling], str], reason: Any = "stop") -> None:
        self.script, self.reason = script, reason
        self.asked: list[Sampling] = []

    async def samples(self, name: str, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[list[Item]]:
        assert name == "job"
        self.asked += [sampling for _, sampling in asked]
        found: list[list[Item]] = []
        for prompt, sampling in asked:
            text = self.script(len(found), sampling)
            tokens: list[Item] = [Token(10 + i, letter, -0.5 - i) for i, letter in enumerate(text)]
            found.append([*tokens, Finish(self.reason, "", "it broke", len(prompt), len(text))])
        return found


def practice(learner: Any, seed: int = 5) -> Practice:
    return Practice(learner, "job", GRADER, seed, (9,))


def test_advantages_are_within_their_group_and_rows_are_as_grpo_takes_them() -> None:
    texts = ["abcd", "ab", "x", "abcd", "abcd", "abcd", "abcd", "abcd"]  # the second group is of one mind
    lesson = practice(Scripted(lambda place, _: texts[place])).lesson(EXAMPLES, 4, 0)
    rewards = [1.0, 2 / 3, 0.0, 1.0]
    mean, spread = sum(rewards) / 4, pstdev(rewards)
    assert lesson.divisor == 8
    assert lesson.told["train_mean_reward"] == pytest.approx((sum(rewards) + 4) / 8)
    assert len(lesson.rows) == 4, "of answers that are as good as each other nothing is learned"
    for row, text, reward in zip(lesson.rows, texts[:4], rewards, strict=True):
        count = len(text)
        assert row["input_ids"] == [1, 2, 3, *range(10, 10 + count)]
        assert row["labels"] == [-100, -100, -100, *range(10, 10 + count)]
        assert row["old_logprobs"] == [0, 0, 0, *(-0.5 - i for i in range(count))]
        assert row["advantages"] == pytest.approx([0, 0, 0, *[(reward - mean) / spread] * count])
    assert lesson.tokens == 8 * 3 + sum(map(len, texts))


def test_a_step_of_which_nothing_is_learned_is_a_step_all_the_same() -> None:
    for text in ("abcd", ""):
        lesson = practice(Scripted(lambda *_, said=text: said)).lesson(EXAMPLES, 2, 0)
        assert len(lesson.rows) == 1
        assert not any(lesson.rows[0]["advantages"])
        assert any(label != -100 for label in lesson.rows[0]["labels"][1:])


def test_draws_depend_on_seed_step_line_and_place_alone() -> None:
    def seeds(seed: int, step: int, examples: Sequence[Example] = EXAMPLES, valid: bool = False) -> list[int | None]:
        learner = Scripted(lambda *_: "a")
        made = practice(learner, seed)
        made.reward(examples, 2, step) if valid else made.lesson(examples, 2, step)
        return [sampling.seed for sampling in learner.asked]

    first = seeds(5, 3)
    assert first == seeds(5, 3)
    assert seeds(5, 3, EXAMPLES[::-1]) == [*first[2:], *first[:2]]
    others = [*first, *seeds(5, 4), *seeds(6, 3), *seeds(5, 3, valid=True)]
    assert len(set(others)) == 16


def test_answers_have_room_and_end_where_a_turn_does() -> None:
    learner = Scripted(lambda *_: "a")
    practice(learner).lesson(EXAMPLES, 2, 0)
    assert {sampling.max_tokens for sampling in learner.asked} == {61}
    assert {sampling.stop_token_ids for sampling in learner.asked} == {(9,)}
    assert {sampling.temperature for sampling in learner.asked} == {1.0}, "what it is likely to say, as it learns it"


def test_what_cannot_be_graded_is_told() -> None:
    lacking = [Example(1, EXAMPLES[0].rows, "{}")]
    lesson = practice(Scripted(lambda *_: "a")).lesson(lacking, 2, 0)
    assert lesson.told["grader_errors"] == 2
    assert "item.answer" in lesson.told["grader_error"]


def test_an_engine_that_ends_is_no_fault_of_the_job_and_a_model_that_fails_is() -> None:
    for reason in ("cancelled", "deadline"):
        with pytest.raises(EndedError):
            practice(Scripted(lambda *_: "a", reason)).lesson(EXAMPLES, 2, 0)
    with pytest.raises(UnsupportedError, match="cannot be sampled from: it broke"):
        practice(Scripted(lambda *_: "a", "error")).reward(EXAMPLES, 2, 0)
