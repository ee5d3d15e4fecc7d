"""What users are trained with in one joint training: frozen, checked when built, every fault at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from ...config import AdapterConfig, number_fault
from ...train.settings.fields import EPOCH, Section, flag, interval, number, one_of, or_none, setting, warmup
from ...train.settings.rates import rate_for
from ...train.settings.schedule import SCHEDULES, rate_factor
from ..stepper.adam import Adam

__all__ = ["FleetSettings"]


def _betas(name: str, value: Any) -> list[str]:
    if not isinstance(value, tuple) or len(value) != 2:
        return [f"{name}: expected two numbers, got {value!r}"]
    faults = [line for i, beta in enumerate(value) for line in number_fault(f"{name}[{i}]", beta, low=0, high=1)]
    return faults or [
        f"{name}[{i}]: expected a number below 1, got {beta!r}" for i, beta in enumerate(value) if beta == 1
    ]


@final
@dataclass(frozen=True, kw_only=True)
class FleetSettings(Section):
    """How each user's adapter is trained, and how many users run together. A step is one of a user's own.

    Nothing that is said of a user here depends on the others: batches, clipping, AdamW, schedule and stopping are each
    user's own, so ``users_per_step`` and ``capacity`` change the speed and the memory, not the adapters.
    """

    SECTION: ClassVar[str] = "fleet"

    batch_size: int = setting(4, number(1, whole=True), "Rows of each user in one of the user's steps.")
    users_per_step: int = setting(
        32, number(1, whole=True), "How many users' batches run as one; more is faster, and takes more memory."
    )
    capacity: int | None = setting(
        None,
        or_none(number(1, whole=True)),
        "How many users are in training at once, in turns where that is more than users_per_step; null: that.",
    )
    epochs: float = setting(3.0, number(0, above=True), "How often all rows of a user are gone through.")
    max_steps: int | None = setting(
        None, or_none(number(1, whole=True)), "Steps of each user, whatever epochs says; null: as epochs says."
    )
    learning_rate: float | None = setting(
        None,
        or_none(number(0, above=True)),
        "The highest learning rate; null: by a rule, from the method and the user's steps.",
    )
    schedule: str = setting("linear", one_of(*SCHEDULES), "How a user's rate goes from its highest to the end.")
    warmup: float = setting(
        0.06, warmup, "How long a user's rate rises: below 1 a part of its steps, else a number of steps."
    )
    max_grad_norm: float | None = setting(
        1.0, or_none(number(0, above=True)), "Each user's gradient is scaled down to this norm; null: never."
    )
    weight_decay: float = setting(0.0, number(0), "AdamW's weight decay; biases and scales are left out.")
    betas: tuple[float, float] = setting((0.9, 0.999), _betas, "AdamW's two decay rates.")
    eps: float = setting(1e-8, number(0), "AdamW's epsilon.")
    eval_every: int | str | None = setting(
        EPOCH,
        or_none(interval),
        "Evaluate a user that has validation rows every so many of its steps, or every 'epoch', and at its end; null: "
        "never.",
    )
    patience: int | None = setting(
        None,
        or_none(number(1, whole=True)),
        "A user stops after so many evaluations without a better one; null: it never stops early.",
    )
    keep_best: bool = setting(
        True, flag, "The adapter of a user with validation rows is that of its best evaluation, not its last step."
    )
    only_gains: bool = setting(
        True,
        flag,
        "Keep nothing for a user whose adapter is no better on its validation rows than the model without it.",
    )
    seed: int = setting(0, number(0, 2**63, whole=True), "Of users that bring no seed: start, order and dropout.")
    save_every: int = setting(
        100, number(1, whole=True), "Write the state every so many joint steps, where there is a folder for it."
    )

    last_blocks: int | None = setting(
        None,
        or_none(number(1, whole=True)),
        "Adapt only the last so many blocks of the model. What goes into them is computed once a row, and kept.",
    )
    input_cache_mb: float = setting(
        2000.0,
        number(0),
        "With last_blocks: how much of that is kept in memory, in megabytes; rows beyond it run through all blocks "
        "each time.",
    )

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        faults = []
        if values["last_blocks"] is None and values["input_cache_mb"] != cls.defaults()["input_cache_mb"]:
            faults.append(f"{cls.key('input_cache_mb')}: has no effect without {cls.key('last_blocks')}")
        if values["capacity"] is not None and values["capacity"] < values["users_per_step"]:
            faults.append(
                f"{cls.key('capacity')}: {values['capacity']} is less than {cls.key('users_per_step')}, "
                f"{values['users_per_step']}"
            )
        if values["eval_every"] is None and values["patience"] is not None:
            faults.append(f"{cls.key('patience')}: has no effect with {cls.key('eval_every')} null")
        return faults

    @property
    def at_once(self) -> int:
        """``capacity``, filled in."""
        return self.capacity or self.users_per_step

    def rate(self, config: AdapterConfig, steps: int) -> float:
        """``learning_rate``, filled in for a method and a user's steps."""
        if self.learning_rate is not None:
            return self.learning_rate
        from ...methods import method_of  # needs torch, which help texts do without

        return rate_for(method_of(config).name, steps)

    def steps_of_epoch(self, rows: int) -> int:
        """Steps of a user in one epoch; the last one of an epoch may have fewer rows."""
        return math.ceil(rows / self.batch_size)

    def steps(self, rows: int) -> int:
        """Steps of a user with so many rows in all."""
        return self.max_steps or math.ceil(self.epochs * self.steps_of_epoch(rows))

    def evaluates(self, step: int, rows: int) -> bool:
        """Whether a user with so many rows is evaluated after this step."""
        if self.eval_every is None:
            return False
        every = self.steps_of_epoch(rows) if isinstance(self.eval_every, str) else self.eval_every
        return step % every == 0 or step == self.steps(rows)

    def adam(self, config: AdapterConfig, step: int, steps: int) -> Adam:
        """How a user makes its step number ``step`` (from 0) of ``steps``."""
        return Adam(
            rate=self.rate(config, steps) * self.factor(step, steps),
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )

    def factor(self, step: int, steps: int) -> float:
        """What the highest rate is multiplied by in step number ``step`` (from 0) of ``steps``."""
        return rate_factor(step, steps, self.warmup, self.schedule)
