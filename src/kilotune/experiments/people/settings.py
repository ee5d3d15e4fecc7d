"""What the demo is run with: the real model and its numbers, and the short form on a small model made on the spot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any, final

from ...config import AdapterConfig, number_fault
from ...errors import ConfigError, gather

__all__ = ["FULL", "QUICK", "TOY", "PeopleSettings", "Sizes", "Training", "chosen"]

TOY = "toy"
TITLES = {"vera": "VeRA", "lora": "LoRA"}


@final
@dataclass(frozen=True)
class Sizes:
    """Rows of each person: to train on, to stop by, to judge by."""

    train: int
    validation: int
    test: int


@final
@dataclass(frozen=True)
class Training:
    """How adapters are trained: the method by its name, its rank, and the rest as FleetSettings has it.

    batch: rows of a user in a step. patience: evaluations (one an epoch) without a better one before a user stops.
    """

    method: str
    rank: int
    rate: float
    epochs: int
    batch: int
    patience: int

    @property
    def title(self) -> str:
        """As it is shown: "VeRA of rank 256"."""
        return f"{TITLES.get(self.method, self.method)} of rank {self.rank}"

    def config(self) -> AdapterConfig:
        """For all linear layers."""
        from ...methods import get_config

        scaling = {"lora_alpha": self.rank} if self.method == "lora" else {}
        return get_config(self.method, r=self.rank, target_modules="all-linear", task_type="CAUSAL_LM", **scaling)


@final
@dataclass(frozen=True)
class PeopleSettings:
    """One run of the demo.

    model: a name that ``--model`` takes, or "toy", which is made on the spot. last_blocks: only so many are adapted.
    shared: the adapter that is trained on everybody's rows. personal: those on top of it. questions: of the test rows
    that are shown with everybody's answers. longest: tokens of an answer.
    """

    model: str
    last_blocks: int
    sizes: Sizes
    shared: Training
    personal: Training
    seed: int = 0
    questions: int = 3
    longest: int = 24

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @property
    def mark(self) -> str:
        """Tells runs apart: a folder goes on only with the run that it holds."""
        return sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


FULL = PeopleSettings(
    model="smollm2",
    last_blocks=4,
    sizes=Sizes(train=80, validation=16, test=24),
    shared=Training("lora", rank=8, rate=5e-3, epochs=2, batch=16, patience=2),
    personal=Training("vera", rank=256, rate=0.06, epochs=2, batch=4, patience=2),
)
QUICK = PeopleSettings(
    model=TOY,
    last_blocks=2,
    sizes=Sizes(train=160, validation=24, test=32),
    shared=Training("lora", rank=4, rate=1e-2, epochs=2, batch=32, patience=2),
    personal=Training("vera", rank=64, rate=0.08, epochs=3, batch=16, patience=2),
)


def chosen(quick: bool, seed: int) -> PeopleSettings:
    """The real run, or the short form of it, from a seed.

    Raises:
        ConfigError: the seed is no whole number from 0 on.

    """
    if faults := number_fault("seed", seed, low=0, high=2**31, whole=True):
        raise ConfigError(gather("the demo cannot be run:", faults))
    values = {**vars(QUICK if quick else FULL), "seed": seed}
    return PeopleSettings(**values)
