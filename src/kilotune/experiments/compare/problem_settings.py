"""The settings of each kind of problem. Need no torch, so that a wrong value is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

from ...config import FrozenDict
from ...train.settings.fields import Section, mapping, number, setting, text

__all__ = ["DigitsSettings", "RecipeSettings", "YoursSettings"]


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
@dataclass(frozen=True, kw_only=True)
class RecipeSettings(Section):
    """Which recipe."""

    SECTION: ClassVar[str] = "problem"

    config: str = setting(
        "",
        text,
        "A config file of kilotune train, with validation and test data; from the folder of this config file. Its "
        "adapter (but for its last_blocks), learning_rate, seed, output and logging are the comparison's, and each run "
        "is trained to its end: there are no evaluations in between, and no early stopping.",
    )


@final
@dataclass(frozen=True, kw_only=True)
class YoursSettings(Section):
    """Where the problem is."""

    SECTION: ClassVar[str] = "problem"

    file: str = setting("", text, "A Python file, which is run; from the folder of this config file.")
    name: str = setting("", text, "The class in it: a subclass of kilotune.experiments.compare.problem.Problem.")
    arguments: Mapping[str, Any] = setting(FrozenDict(), mapping, "What the class is made with, by name.")
