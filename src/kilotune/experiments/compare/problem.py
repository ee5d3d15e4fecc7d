"""What a comparison needs of a problem: a model to train by any method, and a way to score it.

========================  ============================================================================
:class:`Problem`          what ``compare`` calls; knows of no trainer
:class:`ModuleProblem`    any torch module with a training of its own; the methods are put in here
========================  ============================================================================

A problem of your own is a subclass of one of the two; ``docs/compare.md`` shows one.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ...config import AdapterConfig, FrozenDict
from ...errors import ConfigError
from ...methods import get_config
from ...model.peft_model import get_peft_model
from ...train.settings.sections import WHOLE_METHODS

__all__ = ["WHOLE_METHODS", "Bench", "Contender", "ModuleProblem", "Problem", "Score", "Tick"]

SEEDS = ("projection_prng_key", "proj_seed")
"""The options that hold the seed of a method's random matrices. They follow a run's seed, unless they are given."""

Tick = Callable[[int], None]


@final
@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    Attributes:
        name: in tables and pictures.
        method: a name of :func:`kilotune.get_config`, or ``full`` or ``head``.
        options: the method's options; empty for ``full`` and ``head``.
    """

    name: str
    method: str
    options: Mapping[str, Any] = FrozenDict()

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and not the model itself."""
        return self.method not in WHOLE_METHODS

    @property
    def recipe(self) -> str:
        """Method and options as one text, equal for equal contenders whatever they are called."""
        return json.dumps({"method": self.method, **self.options}, sort_keys=True)

    def seeded(self, seed: int) -> dict[str, Any]:
        """The options, with the seed of the method's random matrices."""
        if not self.is_adapter:
            return {}
        known = type(self.config()).option_names()
        return {**{name: seed for name in SEEDS if name in known}, **self.options}

    def config(self, seed: int | None = None) -> AdapterConfig:
        """The adapter's configuration; with the random matrices of ``seed``, if that is given.

        Raises:
            ConfigError: options that are wrong.
        """
        return get_config(self.method, **(self.options if seed is None else self.seeded(seed)))


@final
@dataclass(frozen=True)
class Score:
    """How good one trained model is.

    Attributes:
        validation: what is chosen by, in the problem's metric.
        loss: on the validation data, smaller is better; decides between learning rates of equal score.
        test: the same metric on data that nothing is chosen by; None where it was not asked for.
    """

    validation: float
    loss: float
    test: float | None = None


@final
@dataclass(frozen=True)
class Bench:
    """A model to take the costs of: one step is ``loss()``, its backward, and an optimizer's step.

    Attributes:
        model: in training mode.
        loss: of one batch of the usual size.
    """

    model: nn.Module
    loss: Callable[[], Tensor]


class Problem(ABC):
    """What is learned, from where, and how it is scored.

    Attributes:
        name: for titles.
        metric: what a score is, such as "accuracy".
        percent: scores are shares of 1, and shown in percent.
        larger_is_better: which way is up.
        steps: of the optimizer in a run of full length.
    """

    name: str
    metric: str = "accuracy"
    percent: bool = True
    larger_is_better: bool = True
    steps: int

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that decides the numbers of a run beside its contender, learning rate, seed and budget; JSON types."""

    def usual(self, method: str) -> Mapping[str, Any]:
        """Options that a method has on this problem where a contender gives none."""
        return {}

    @abstractmethod
    def run(self, contender: Contender, rate: float, seed: int, budget: float, test: bool, tick: Tick) -> Score:
        """Train from the start, and score.

        Args:
            contender: what is trained.
            rate: learning rate.
            seed: of what is drawn: the adapter, the order of the data, and the model where it starts at random.
            budget: share of :attr:`steps` to train for, above 0 and at most 1; a schedule is shortened with it.
            test: score the test split too.
            tick: to be told now and then how many steps were made since it was last called.

        Raises:
            DivergedError: the loss stopped being a finite number; the run counts as failed.
        """

    @abstractmethod
    def start(self, seed: int) -> Score:
        """The scores before any training, the test split's too."""

    @abstractmethod
    def bench(self, contender: Contender | None) -> Bench:
        """A model to take the costs of. None: the base with everything frozen.

        Raises:
            KilotuneError: this contender cannot be trained on this problem.
        """


class ModuleProblem(Problem):
    """A torch module with a training of its own. ``fit`` trains whatever requires a gradient.

    Attributes:
        head: names of the modules that the method ``head`` trains.
    """

    head: tuple[str, ...] = ()

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """The model where training starts; what full training trains requires a gradient. Equal for equal seeds."""

    @abstractmethod
    def fit(self, model: nn.Module, rate: float, seed: int, budget: float, tick: Tick) -> None:
        """Train; see :meth:`Problem.run`."""

    @abstractmethod
    def scores(self, model: nn.Module, test: bool) -> Score:
        """The model's scores; trains nothing."""

    @abstractmethod
    def batch_loss(self, model: nn.Module) -> Tensor:
        """The loss of one batch of the usual size, always the same one."""

    def run(self, contender: Contender, rate: float, seed: int, budget: float, test: bool, tick: Tick) -> Score:
        model = self.model_of(contender, seed)
        self.fit(model, rate, seed, budget, tick)
        return self.scores(model, test)

    def start(self, seed: int) -> Score:
        return self.scores(self.build(seed), True)

    def bench(self, contender: Contender | None) -> Bench:
        model = self.build(0).requires_grad_(False) if contender is None else self.model_of(contender, 0)
        return Bench(model.train(), lambda: self.batch_loss(model))

    def model_of(self, contender: Contender, seed: int) -> nn.Module:
        """The model, and in it what the contender trains."""
        model = self.build(seed)
        if contender.method == "full":
            return model
        if contender.method == "head":
            if not self.head:
                raise ConfigError(f"method 'head': {self.name} says of no module that it is the head")
            model.requires_grad_(False)
            for name in self.head:
                model.get_submodule(name).requires_grad_(True)
            return model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, contender.config(seed))
