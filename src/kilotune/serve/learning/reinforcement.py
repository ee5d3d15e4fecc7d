"""What a model in training says to its prompts, graded: the rows from which reinforcement learns.

A step samples a group of answers to each of its prompts from the model as it is now, with the engine that answers
everybody. What an answer's reward is above or below its group's mean, in the group's standard deviations, is its
advantage (GRPO: Shao et al. 2024, arXiv 2402.03300). Draws depend on the job's seed, the step, the line and the place
in the group alone, so a job that was stopped draws the same ones again.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple, final

from ...errors import ConfigError, StoreError, UnsupportedError
from ..engine.interface import Finish, Item, Sampling, Token
from .graders import Graded, Grader, read_grader
from .learner import Learner
from .schedule import LONGEST_ANSWER
from .training_file import TOLD, Example, Row, TrainingFile

__all__ = ["EndedError", "Lesson", "Practice"]

SMALL = 1e-6  # of a standard deviation, so that rounding is no advantage


@final
class EndedError(Exception):
    """The engine ends, or has no time: nothing is wrong with the job."""


@final
class Lesson(NamedTuple):
    """What a step learns from: rows, what their losses are divided by (None: a mean), metrics, tokens that it took."""

    rows: Sequence[Row]
    divisor: float | None
    told: dict[str, Any]
    tokens: int


@final
class _Answer(NamedTuple):
    ids: list[int]
    logprobs: list[float]
    text: str


@final
class Practice:
    """One model's answers.

    Args:
        learner: has the model.
        name: of it there.
        grader: as the job has it.
        seed: of the job.
        ends: tokens that end an answer beside the model's own.

    Raises:
        ConfigError: there is no such grader.

    """

    def __init__(self, learner: Learner, name: str, grader: Any, seed: int, ends: tuple[int, ...]) -> None:
        self._learner, self._name, self._seed, self._ends = learner, name, seed, ends
        self.grader: Grader = read_grader(grader, "method.reinforcement.grader")

    def check(self, file: TrainingFile, what: str) -> None:
        """See that each line has what the grader asks for.

        Raises:
            ConfigError: which do not.

        """
        found = ((one.line, self.grader.lacks(one.item)) for one in file.examples)
        faults = [f"  - line {line}: {told}" for line, told in found if told is not None]
        if faults:
            more = ["  - and more"] if len(faults) > TOLD else []
            raise ConfigError("\n".join([f"{what} cannot be trained on:", *faults[:TOLD], *more]))

    def lesson(self, examples: Sequence[Example], group: int, step: int) -> Lesson:
        """What a step learns from.

        Raises:
            EndedError: the engine ends.

        """
        answers = self._answers(examples, group, f"train {step}")
        graded = self._graded(examples, group, answers)
        rows: list[Row] = []
        for place, example in enumerate(examples):
            own = range(place * group, (place + 1) * group)
            rewards = [graded[i].reward for i in own]
            mean, spread = fmean(rewards), pstdev(rewards)
            if spread > SMALL:  # else all are as good as each other, and nothing is learned from them
                pairs = zip(own, rewards, strict=True)
                rows += [_row(example, answers[i], (one - mean) / spread) for i, one in pairs if answers[i].ids]
        prompts = [example.rows[0]["input_ids"] for example in examples for _ in range(group)]
        if not rows:  # a step is made all the same: its number says where the job is
            rows = [_row(examples[0], _Answer([prompts[0][-1]], [0.0], ""), 0.0)]
        told: dict[str, Any] = {"train_mean_reward": fmean(one.reward for one in graded)}
        if faults := [one.told for one in graded if one.fault is not None]:
            told |= {"grader_errors": len(faults), "grader_error": str(faults[0])[:300]}
        tokens = sum(len(ids) + len(answer.ids) for ids, answer in zip(prompts, answers, strict=True))
        return Lesson(rows, float(len(answers)), told, tokens)

    def reward(self, examples: Sequence[Example], count: int, step: int) -> float:
        """The mean reward of ``count`` answers to each prompt; raises as :meth:`lesson`."""
        answers = self._answers(examples, count, f"valid {step}")
        return fmean(one.reward for one in self._graded(examples, count, answers))

    def _graded(self, examples: Sequence[Example], group: int, answers: Sequence[_Answer]) -> list[Graded]:
        return [self.grader.grade(examples[i // group].item, one.text) for i, one in enumerate(answers)]

    def _answers(self, examples: Sequence[Example], group: int, when: str) -> list[_Answer]:
        asked = []
        for example in examples:
            prompt = example.rows[0]["input_ids"]
            most = min(LONGEST_ANSWER, self._learner.longest - len(prompt))
            for place in range(group):
                seed = _number(f"{self._seed} {when} {example.line} {place}")
                sampling = Sampling(max_tokens=most, seed=seed, stop_token_ids=self._ends, logprobs=0)
                asked.append((prompt, sampling))
        try:
            return [_answer(items) for items in asyncio.run(self._learner.samples(self._name, asked))]
        except StoreError as error:
            raise EndedError(str(error)) from error


def _answer(items: Sequence[Item]) -> _Answer:
    tokens = [item for item in items if isinstance(item, Token)]
    last = items[-1] if items else None
    if not isinstance(last, Finish) or last.reason in ("cancelled", "deadline"):
        raise EndedError("the engine ended")
    if last.reason == "error":
        raise UnsupportedError(f"the model cannot be sampled from: {last.error}")
    logprobs = [math.nan if token.logprob is None else token.logprob for token in tokens]
    return _Answer([token.id for token in tokens], logprobs, "".join(token.text for token in tokens) + last.text)


def _row(example: Example, answer: _Answer, advantage: float) -> Row:
    prompt = example.rows[0]["input_ids"]
    before = len(prompt)
    return {
        "input_ids": [*prompt, *answer.ids],
        "labels": [*[-100] * before, *answer.ids],
        "old_logprobs": [*[0.0] * before, *answer.logprobs],
        "advantages": [*[0.0] * before, *[advantage] * len(answer.ids)],
    }


def _number(words: str) -> int:
    """A seed that depends on these words alone."""
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()) >> 1
