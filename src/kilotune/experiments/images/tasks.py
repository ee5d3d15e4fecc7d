"""What the search for an intrinsic dimension needs of a training task, and the two image tasks.

A task of your own is a subclass of :class:`Task`; ``docs/intrinsic-dimension.md`` shows one.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import nn

from .cifar import cifar10
from .convnet import LORA_WIDTHS, ConvNet, build
from .digits_data import ImageSet, Progress, digits
from .settings import ImageSettings, Recipe
from .training import count_steps, logits_of, train

__all__ = ["ImageTask", "Scores", "Task", "Tick"]

Tick = Callable[[int], None]
VALIDATION_SHARE = 0.25
VALIDATION_SEED = 1


@final
@dataclass(frozen=True)
class Scores:
    """How good one trained model is.

    Attributes:
        validation: what is searched by: larger is better, and 0 is worthless.
        test: the same on data that nothing was chosen by; only reported.
        loss: on the validation data, smaller is better; it decides between learning rates of equal score.
    """

    validation: float
    test: float
    loss: float


class Task(ABC):
    """A model to train, and a way to score it."""

    name: str
    metric: ClassVar[str] = "accuracy"
    """What a score is."""
    percent: ClassVar[bool] = True
    """Scores are shares of 1, and shown in percent."""
    targets: tuple[str, ...] | str
    """The layers whose weights the subspace is in: target_modules of the adapter."""
    steps: int
    """Optimizer steps of one run, for the progress bar."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All that decides the numbers of one run, in plain JSON types; finished runs of other settings are refused."""

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """A new model where training starts; what full training trains requires a gradient. Equal for equal seeds."""

    @abstractmethod
    def fit(self, model: nn.Module, rate: float, seed: int, tick: Tick) -> None:
        """Train whatever in ``model`` requires a gradient, at this learning rate.

        Args:
            model: from :meth:`build`, plain or adapted.
            rate: learning rate.
            seed: of the order of the data, and of anything else that is drawn.
            tick: to be told now and then how many steps were made since it was last called.

        Raises:
            DivergedError: the loss stopped being a finite number; the run counts as failed, and the search goes on.
        """

    @abstractmethod
    def scores(self, model: nn.Module) -> Scores:
        """The model's scores; trains nothing."""


@final
@dataclass
class ImageTask(Task):
    """Ten classes of pictures; the network of the tutorial on LoRA (LeNet's layout, 62,006 numbers in use).

    A quarter of each class's training pictures is held out for validation. The subspace is in the weights of both
    convolutions and all three linear layers; biases stay as they start. Full training trains the biases too.
    """

    settings: ImageSettings
    name: str
    steps: int
    source: str
    sizes: dict[str, int]
    fit_on: ImageSet
    pretrain_on: ImageSet
    validation: ImageSet
    test: ImageSet
    targets: tuple[str, ...] = ("conv1", "conv2", "fc1", "fc2", "fc3")
    _pretrained: dict[int, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: ImageSettings, progress: Progress | None = None) -> ImageTask:
        """Read the pictures and split them.

        Raises:
            KilotuneError: the data cannot be had.
        """
        data = digits() if settings.data == "digits" else cifar10(settings.data_dir, progress)
        fit, validation = data.train.split(VALIDATION_SHARE, 10, VALIDATION_SEED)
        turned = [part.turned(range(10), settings.rotation) for part in (fit, validation, data.test)]
        sizes = {"training": len(fit), "validation": len(validation), "test": len(data.test)}
        steps = count_steps(len(fit), settings.recipe(1.0))
        return cls(settings, settings.name, steps, data.source, sizes, turned[0], fit, turned[1], turned[2])

    def describe(self) -> dict[str, Any]:
        return {"task": "images", **self.settings.to_dict(), "pictures": self.sizes, "source": self.source}

    def build(self, seed: int) -> nn.Module:
        if self.settings.start == "scratch":
            return _network(seed)
        if seed not in self._pretrained:
            network = _network(seed)
            chosen = self.settings
            recipe = Recipe(chosen.pretrain_rate, chosen.pretrain_epochs, chosen.batch, optimizer="adam")
            train(network, self.pretrain_on, recipe, seed)
            self._pretrained[seed] = network
        return copy.deepcopy(self._pretrained[seed])

    def fit(self, model: nn.Module, rate: float, seed: int, tick: Tick) -> None:
        train(model, self.fit_on, self.settings.recipe(rate), seed, tick)

    def scores(self, model: nn.Module) -> Scores:
        held, test = logits_of(model, self.validation), logits_of(model, self.test)
        return Scores(
            validation=_accuracy(held, self.validation.labels),
            test=_accuracy(test, self.test.labels),
            loss=nn.functional.cross_entropy(held, self.validation.labels).item(),
        )


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()


def _network(seed: int) -> ConvNet:
    network = build(LORA_WIDTHS, seed)
    network.conv3_unused.requires_grad_(False)  # never called, so nobody trains it and nobody counts it
    return network
