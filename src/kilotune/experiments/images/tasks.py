"""What the search for an intrinsic dimension needs of a training task, and the two image tasks.

A task of your own is a subclass of :class:`Task`; ``docs/intrinsic-dimension.md`` shows one.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import nn

from ...errors import ConfigError, did_you_mean, gather
from .cifar import cifar10
from .convnet import LORA_WIDTHS, ConvNet, build
from .digits_data import ImageSet, Progress, digits
from .training import Recipe, count_steps, logits_of, train

__all__ = ["STARTS", "ImageSettings", "ImageTask", "Scores", "Task", "Tick"]

Tick = Callable[[int], None]
DATA = ("digits", "cifar10")
STARTS = ("scratch", "pretrained")
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
@dataclass(frozen=True)
class ImageSettings:
    """Classifying pictures with the tutorials' convolutional network.

    Attributes:
        data: "digits" or "cifar10".
        start: "scratch": random weights. "pretrained": a network that was trained in full on the upright pictures.
        rotation: degrees by which all pictures are turned; those of the pretraining never are.
        epochs: of one run.
        batch: pictures per step.
        pretrain_epochs: of the pretraining, with Adam at ``pretrain_rate``.
        pretrain_rate: its learning rate.
        data_dir: folder or archive with CIFAR-10; None downloads it.

    Raises:
        ConfigError: for everything that is wrong, at once.
    """

    data: str = "digits"
    start: str = "scratch"
    rotation: float = 0.0
    epochs: int = 10
    batch: int = 32
    pretrain_epochs: int = 10
    pretrain_rate: float = 1e-3
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {value!r}, not {' or '.join(map(repr, valid))}.{did_you_mean(value, valid)}"
            for name, value, valid in (("data", self.data, DATA), ("start", self.start, STARTS))
            if value not in valid
        ]
        for name in ("epochs", "batch", "pretrain_epochs"):
            if getattr(self, name) < 1:
                faults.append(f"{name} is {getattr(self, name)}, and must be 1 or more")
        if not 0 < self.pretrain_rate < float("inf"):
            faults.append(f"pretrain_rate is {self.pretrain_rate}, and must be a positive number")
        if not -360 <= self.rotation <= 360:
            faults.append(f"rotation is {self.rotation}, and must be within -360 and 360 degrees")
        if self.data_dir is not None and self.data == "digits":
            faults.append("data_dir is for cifar10: the digits come with scikit-learn")
        if self.data_dir is not None and not self.data_dir.exists():
            faults.append(f"data_dir {self.data_dir} does not exist")
        if self.start == "pretrained" and self.rotation % 360 == 0:
            faults.append(
                "a pretrained start needs a rotation: on the pictures that it was trained on, nothing is left to learn"
            )
        if faults:
            raise ConfigError(gather("the task cannot be run:", faults))

    @property
    def name(self) -> str:
        """Such as "digits from scratch"."""
        turned = f", turned by {self.rotation:g} degrees" if self.rotation % 360 else ""
        return f"{self.data} from {'scratch' if self.start == 'scratch' else 'a pretrained network'}{turned}"

    def recipe(self, rate: float) -> Recipe:
        """How one run is trained."""
        return Recipe(rate, self.epochs, self.batch, optimizer="adam")

    def to_dict(self) -> dict[str, Any]:
        """What decides the numbers, in plain JSON types."""
        facts: dict[str, Any] = {"data": self.data, "from": self.start, "rotation_degrees": self.rotation}
        facts |= {"epochs": self.epochs, "batch": self.batch, "optimizer": "Adam"}
        if self.start == "pretrained":
            facts |= {"pretrain_epochs": self.pretrain_epochs, "pretrain_rate": self.pretrain_rate}
        return facts


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
