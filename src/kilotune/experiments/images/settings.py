"""What the image tasks are run with: checked without importing torch, so that a wrong value is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, final

from ...errors import ConfigError, did_you_mean, gather

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["CIFAR_NAMES", "ImageSettings", "Recipe"]

DATA = ("digits", "cifar10")
STARTS = ("scratch", "pretrained")
CIFAR_NAMES: Final = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
"""The classes of CIFAR-10, in the order of their numbers."""


@final
@dataclass(frozen=True)
class Recipe:
    """SGD as in the tutorials, or Adam.

    Attributes:
        rate: learning rate.
        epochs: passes over the pictures.
        batch: pictures per step.
        momentum: of SGD.
        optimizer: "sgd", or "adam" with torch's defaults.
    """

    rate: float
    epochs: int
    batch: int = 4
    momentum: float = 0.9
    optimizer: Literal["sgd", "adam"] = "sgd"

    def optimizer_of(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        import torch

        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=self.rate)
        return torch.optim.SGD(parameters, lr=self.rate, momentum=self.momentum)


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
