"""The digits: a small convolutional network, trained on upright digits, learns turned ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import Tensor, nn

from ...train.settings.fields import Section, number, setting
from ..images.tasks import ImageSettings, ImageTask
from ..images.training import logits_of, train
from .problem import ModuleProblem, Score, Tick

__all__ = ["Digits", "DigitsSettings"]

LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
HIDDEN = ("conv1", "conv2", "fc1", "fc2")
# What each method adapts, where nothing else is said: every layer, or where the method's paper puts it.
USUAL: Mapping[str, Mapping[str, Any]] = {
    "bitfit": {"target_modules": LAYERS},
    "ia3": {"target_modules": LAYERS, "feedforward_modules": ()},
    "bottleneck": {"target_modules": ("fc1", "fc2"), "width": 8},
}


@final
@dataclass(frozen=True, kw_only=True)
class DigitsSettings(Section):
    """scikit-learn's digits."""

    SECTION: ClassVar[str] = "problem"

    rotation: float = setting(45.0, number(-360, 360), "Degrees by which the digits to be learned are turned.")
    epochs: int = setting(12, number(1, whole=True), "Epochs of a run of full length.")
    batch: int = setting(32, number(1, whole=True), "Pictures per step.")
    pretrain_epochs: int = setting(10, number(1, whole=True), "Epochs of the pretraining on upright digits.")

    @classmethod
    def together(cls, values: Mapping[str, Any]) -> list[str]:
        turned = values["rotation"] % 360 != 0
        return [] if turned else [f"{cls.key('rotation')}: at 0 degrees nothing is left to learn"]


@final
class Digits(ModuleProblem):
    """Ten classes. Each seed pretrains a network of its own; Adam at a constant rate; accuracy on 599 pictures."""

    head = ("fc3",)

    def __init__(self, settings: DigitsSettings) -> None:
        self.settings = settings
        self.task = ImageTask.of(
            ImageSettings(
                start="pretrained",
                rotation=settings.rotation,
                epochs=settings.epochs,
                batch=settings.batch,
                pretrain_epochs=settings.pretrain_epochs,
            )
        )
        self.name, self.steps = f"digits turned by {settings.rotation:g} degrees", self.task.steps

    def describe(self) -> dict[str, Any]:
        return {"problem": "digits", **self.task.describe()}

    def usual(self, method: str) -> Mapping[str, Any]:
        return USUAL.get(method, {"target_modules": LAYERS})

    def build(self, seed: int) -> nn.Module:
        return self.task.build(seed)

    def fit(self, model: nn.Module, rate: float, seed: int, budget: float, tick: Tick) -> None:
        recipe = self.task.settings.recipe(rate)
        train(model, self.task.fit_on, replace(recipe, epochs=max(1, round(budget * recipe.epochs))), seed, tick)

    def scores(self, model: nn.Module, test: bool) -> Score:
        held, labels = logits_of(model, self.task.validation), self.task.validation.labels
        loss = nn.functional.cross_entropy(held, labels).item()
        seen = self.task.test
        return Score(_accuracy(held, labels), loss, _accuracy(logits_of(model, seen), seen.labels) if test else None)

    def batch_loss(self, model: nn.Module) -> Tensor:
        pictures, labels = next(self.task.fit_on.batches(self.settings.batch))
        return nn.functional.cross_entropy(model(pictures), labels)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()
