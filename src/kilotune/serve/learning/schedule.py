"""How a job is trained: batches, epochs, rates, where the request says "auto"."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ...config import AdapterConfig
from ...fleet.joint.settings import FleetSettings
from ...fleet.stepper.adam import Adam
from ...fleet.stepper.objectives import Dpo, Grpo, Objective, Supervised
from .training_file import Example

__all__ = ["LONGEST_ANSWER", "Plan"]

LEAST_STEPS = 100  # of a job that says nothing of epochs, whatever few rows it has
MOST_EPOCHS = 25
BATCH = 4
EPOCHS_KEPT = 3  # the last ones, whose models are served
GROUP = 8  # answers to each prompt of a step
LONGEST_ANSWER = 256  # tokens of an answer that is sampled to be graded


@final
@dataclass(frozen=True)
class Plan:
    """What a job comes to. examples: of the training file; asked: of the job; config: of the adapter."""

    examples: Sequence[Example]
    asked: Mapping[str, Any]
    config: AdapterConfig

    @property
    def batch_size(self) -> int:
        """Examples of a step."""
        wanted: int | None = self.asked["batch_size"]
        return min(wanted or BATCH, len(self.examples))

    @property
    def epoch_steps(self) -> int:
        """Steps of an epoch."""
        return math.ceil(len(self.examples) / self.batch_size)

    @property
    def epochs(self) -> int:
        """How often the file is gone through."""
        wanted: int | None = self.asked["epochs"]
        return wanted or min(MOST_EPOCHS, max(3, math.ceil(LEAST_STEPS / self.epoch_steps)))

    @property
    def steps(self) -> int:
        """In all."""
        return self.epochs * self.epoch_steps

    @property
    def group(self) -> int:
        """Answers to each prompt that are sampled, where a grader says what is learned; else 1."""
        if self.asked["method"] != "reinforcement":
            return 1
        return max(2, round(GROUP * (self.asked["compute_multiplier"] or 1.0)))

    @property
    def tokens(self) -> int:
        """That are trained in all; of sampled answers, as many as there can be."""
        more = LONGEST_ANSWER if self.asked["method"] == "reinforcement" else 0
        return self.epochs * self.group * sum(example.tokens + more for example in self.examples)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What "auto" came to, by OpenAI's names."""
        asked = self.asked
        made = {
            "n_epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": 1.0 if asked["rate_multiplier"] is None else asked["rate_multiplier"],
        }
        if asked["method"] == "dpo":
            made["beta"] = asked["beta"] or 0.1
        if asked["method"] == "reinforcement":
            made["compute_multiplier"] = asked["compute_multiplier"] or 1.0
            if asked["validation_file"] is not None:
                made["eval_interval"] = asked["eval_interval"] or self.epoch_steps
                made["eval_samples"] = asked["eval_samples"] or 1
        return made

    def keeps(self, step: int) -> bool:
        """Whether the model behind a step, from 1, is a checkpoint that is served beside the last one."""
        epoch, rest = divmod(step, self.epoch_steps)
        return not rest and self.epochs - EPOCHS_KEPT < epoch < self.epochs

    def validates(self, step: int) -> bool:
        """Whether the validation file is gone through behind a step, from 1."""
        return step % (self.asked["eval_interval"] or self.epoch_steps) == 0

    @property
    def objective(self) -> Objective:
        """What is learned."""
        if self.asked["method"] == "reinforcement":
            return Grpo()
        return Dpo(beta=self.asked["beta"] or 0.1) if self.asked["method"] == "dpo" else Supervised()

    def batch(self, step: int) -> list[Example]:
        """The examples of a step, from 0; the same for the same seed, wherever it runs."""
        epoch, place = divmod(step, self.epoch_steps)
        order = list(range(len(self.examples)))
        random.Random(f"{self.asked['seed']} {epoch}").shuffle(order)
        chosen = order[place * self.batch_size : (place + 1) * self.batch_size]
        return [self.examples[i] for i in chosen]

    def adam(self, step: int) -> Adam:
        """How the step is made."""
        settings = FleetSettings(seed=0)
        made = settings.adam(self.config, step, self.steps)
        factor = 1.0 if self.asked["rate_multiplier"] is None else self.asked["rate_multiplier"]
        return Adam(rate=made.rate * factor, betas=made.betas, eps=made.eps, max_grad_norm=made.max_grad_norm)
