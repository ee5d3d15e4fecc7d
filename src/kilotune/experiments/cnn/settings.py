"""What the experiment is run with: the defaults of each data set, and the checks of what a user chose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

from ...errors import ConfigError, did_you_mean, gather
from ..images.settings import CIFAR_NAMES, Recipe

__all__ = ["CLASS_NAMES", "DEFAULTS", "LABELS", "METHODS", "CnnSettings", "choose"]

METHODS = ("vera", "lora", "full")
LABELS: Mapping[str, str] = MappingProxyType({"vera": "VeRA", "lora": "LoRA", "full": "full fine-tuning"})
VERA_RANK = 32
VERA_D_INITIAL = 0.1
LORA_RANK = 4
LORA_ALPHA = 4
DIGITS_RATES: Mapping[str, float] = MappingProxyType({"vera": 3e-2, "lora": 3e-3, "full": 1e-3})
"""By held-out loss (:mod:`.tuning`). For VeRA 0.05 does as well, and 0.1 diverges on most seeds."""
CIFAR_RATES: Mapping[str, float] = MappingProxyType({"vera": 1e-2, "lora": 1e-3, "full": 1e-3})
"""The tutorials' rate for LoRA and full fine-tuning, ten times that for VeRA; not tuned."""
CLASS_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"digits": tuple(str(i) for i in range(10)), "cifar10": CIFAR_NAMES}
)


@final
@dataclass(frozen=True)
class CnnSettings:
    """Everything that decides the experiment's numbers.

    Attributes:
        data: "digits" or "cifar10".
        classes: the classes that the copies are adapted to; the others are not shown again.
        rotation: degrees by which the adapted classes' pictures are turned, to make room (0: not at all).
        seeds: how many times everything is repeated, with ``first_seed``, ``first_seed + 1``, ...
        first_seed: the first seed: of the weights, the order of the pictures and the projections.
        epochs: of the pretraining on all ten classes.
        adapt_epochs: of each adaptation, on the chosen classes.
        batch: pictures per step.
        pretrain_rate: learning rate of the pretraining.
        rates: learning rate of each method of adapting.
        data_dir: folder or archive that holds CIFAR-10; None downloads it.

    Raises:
        ConfigError: for everything that is wrong, at once.
    """

    data: str = "digits"
    classes: tuple[int, ...] = (2, 3, 7)
    rotation: float = 30.0
    seeds: int = 3
    first_seed: int = 0
    epochs: int = 10
    adapt_epochs: int = 8
    batch: int = 4
    pretrain_rate: float = 2e-3
    rates: Mapping[str, float] = field(default_factory=lambda: dict(DIGITS_RATES))
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        faults = [*self._count_faults(), *self._rate_faults(), *self._class_faults()]
        if self.data not in CLASS_NAMES:
            faults.append(f"data is {self.data!r}, not 'digits' or 'cifar10'.{did_you_mean(self.data, CLASS_NAMES)}")
        if self.data_dir is not None and self.data == "digits":
            faults.append("data_dir is for cifar10: the digits come with scikit-learn")
        if self.data_dir is not None and not self.data_dir.exists():
            faults.append(f"data_dir {self.data_dir} does not exist")
        if not math.isfinite(self.rotation):
            faults.append(f"rotation is {self.rotation}, not a number of degrees")
        if faults:
            raise ConfigError(gather("the experiment cannot be run:", faults))

    def _count_faults(self) -> list[str]:
        names = ("seeds", "epochs", "adapt_epochs", "batch")
        faults = [f"{n} is {getattr(self, n)}, and must be 1 or more" for n in names if getattr(self, n) < 1]
        if not 0 <= self.first_seed < 2**32:
            faults.append(f"first_seed is {self.first_seed}, and must be 0 to {2**32 - 1}")
        return faults

    def _rate_faults(self) -> list[str]:
        rates = {"pretrain_rate": self.pretrain_rate, **{f"rate of {m}": r for m, r in self.rates.items()}}
        faults = [f"{n} is {r}, and must be above 0" for n, r in rates.items() if not (r > 0 and math.isfinite(r))]
        if set(self.rates) != set(METHODS):
            faults.append(f"rates are needed for {', '.join(METHODS)}, not for {', '.join(sorted(self.rates))}")
        return faults

    def _class_faults(self) -> list[str]:
        outside = [c for c in self.classes if not 0 <= c <= 9]
        faults = [f"there is no class {c}: they are 0 to 9" for c in outside]
        if len(set(self.classes)) != len(self.classes):
            faults.append(f"classes {self.classes} repeat")
        if not 2 <= len(self.classes) <= 9:
            faults.append(f"{len(self.classes)} classes to adapt to: choose 2 to 9, so that others can pay")
        return faults

    @property
    def all_seeds(self) -> list[int]:
        """The seeds, in order."""
        return list(range(self.first_seed, self.first_seed + self.seeds))

    @property
    def other_classes(self) -> list[int]:
        """The classes that are not adapted to."""
        return [c for c in range(10) if c not in self.classes]

    @property
    def pretraining(self) -> Recipe:
        """How the network is pretrained."""
        return Recipe(self.pretrain_rate, self.epochs, self.batch)

    def adaptation(self, method: str) -> Recipe:
        """How a copy is adapted with "vera", "lora" or "full"."""
        return Recipe(self.rates[method], self.adapt_epochs, self.batch)

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types, without the folder, which decides no number."""
        return {
            "data": self.data,
            "classes": list(self.classes),
            "rotation_degrees": self.rotation,
            "seeds": self.all_seeds,
            "pretraining": {"rate": self.pretrain_rate, "epochs": self.epochs},
            "adaptation": {"rates": dict(self.rates), "epochs": self.adapt_epochs},
            "optimizer": {"name": "SGD", "momentum": self.pretraining.momentum, "batch": self.batch},
            "vera": {"r": VERA_RANK, "d_initial": VERA_D_INITIAL, "sharing": "shape"},
            "lora": {"r": LORA_RANK, "lora_alpha": LORA_ALPHA},
        }


DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "digits": {},
        "cifar10": {
            "classes": (2, 3, 4),
            "rotation": 0.0,
            "epochs": 6,
            "adapt_epochs": 2,
            "pretrain_rate": 1e-3,
            "rates": CIFAR_RATES,
        },
    }
)
QUICK: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "digits": {"seeds": 1, "epochs": 4, "pretrain_rate": 4e-3, "adapt_epochs": 4},
        "cifar10": {"seeds": 1, "epochs": 1, "adapt_epochs": 1},
    }
)


def choose(data: str, *, quick: bool, chosen: Mapping[str, Any]) -> CnnSettings:
    """Settings of a data set: what was chosen (not None), else the quick values, else its defaults.

    Args:
        data: "digits" or "cifar10".
        quick: one seed and fewer epochs.
        chosen: fields of :class:`CnnSettings`; ``rates`` may hold some methods only, ``classes`` may be text
            such as "2,3,7" or "bird,cat,deer".
    """
    values = {**DEFAULTS.get(data, {}), **(QUICK.get(data, {}) if quick else {})}
    values |= {name: value for name, value in chosen.items() if value is not None}
    if isinstance(values.get("classes"), str):
        values["classes"] = _parse_classes(values["classes"], CLASS_NAMES.get(data, CLASS_NAMES["digits"]))
    rates = {**DIGITS_RATES, **DEFAULTS.get(data, {}).get("rates", {})}
    rates |= {method: rate for method, rate in values.pop("rates", {}).items() if rate is not None}
    return CnnSettings(data=data, rates=rates, **values)


def _parse_classes(text: str, names: Sequence[str]) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in names and not word.isdecimal()]
    if unknown:
        faults = [f"{word!r} is no class.{did_you_mean(word, names)}" for word in unknown]
        raise ConfigError(gather(f"classes are numbers or names, among {', '.join(names)}:", faults))
    return tuple(names.index(word) if word in names else int(word) for word in words)
