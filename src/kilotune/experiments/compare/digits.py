"""The digits: a small convolutional network, trained on upright digits, learns turned ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

from torch import Tensor, nn

from ..images.settings import ImageSettings
from ..images.tasks import ImageTask
from ..images.training import logits_of, train
from .problem import ModuleProblem, Score, Tick
from .problem_settings import DigitsSettings

__all__ = ["Digits"]

LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
HIDDEN = ("conv1", "conv2", "fc1", "fc2")
# What each method adapts, where nothing else is said: every layer, or where the method's paper puts it.
USUAL: Mapping[str, Mapping[str, Any]] = {
    "bitfit": {"target_modules": LAYERS},
    "ia3": {"target_modules": LAYERS, "feedforward_modules": ()},
    "bottleneck": {"target_modules": ("fc1", "fc2"), "width": 8},
}


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
