"""Small adapters for the tests of the stores, and stores to put them in."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.fleet.store import AdapterStore, Contents, open_store
from tests.support.models import mlp

CONFIG: dict[str, Any] = {
    "peft_type": "VERA",
    "r": 4,
    "target_modules": ["0", "2"],
    "save_projection": True,
    "kilotune": {"format": 1, "save_projection": False},
}
KEYS = {
    "base_model.model.0.vera_lambda_b": 5,
    "base_model.model.0.vera_lambda_d": 4,
    "base_model.model.2.vera_lambda_b": 3,
    "base_model.model.2.vera_lambda_d": 4,
}
KINDS = ("sqlite", "postgres")
Opener = Callable[..., AdapterStore]


class Clock:
    """Seconds since 1970, which stand still until they are moved."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def contents(seed: int, config: Mapping[str, Any] = CONFIG) -> Contents:
    """A VeRA adapter for :func:`models.mlp` with numbers of its own, without a model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(size, generator=generator) for key, size in KEYS.items()}
    return Contents(config, tensors, {"format": "pt", "kilotune_sha256": ""})


def adapted(seed: int = 0, config: Any = None, base: int = 0) -> PeftModel:
    """A small model with an adapter that does something."""
    config = config or VeraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(mlp(seed=base), config)
    shake(model, seed)
    return model.eval()


def lora(seed: int = 0) -> PeftModel:
    return adapted(seed, LoraConfig(r=2, target_modules=["0", "2"]))


@torch.no_grad()
def shake(model: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 100)
    for _, parameter in model.adapter_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))


def inputs() -> Tensor:
    return torch.randn(7, 6, generator=torch.Generator().manual_seed(1))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """The same keys, types, shapes and bits."""
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and bits(one[k]) == bits(other[k])
        for k in one
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def has_postgres() -> bool:
    """Whether PostgreSQL is installed; on CI it must be."""
    from tests.support import postgres_server

    there = postgres_server.binaries() is not None
    assert there or os.environ.get("CI") != "true", "PostgreSQL is not installed, and CI has to test it"
    return there


def new_url(kind: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """The URL of a store that is not there yet."""
    if kind == "sqlite":
        return f"sqlite:///{folder / 'adapters.db'}"
    if not has_postgres():
        pytest.skip("PostgreSQL is not installed (Debian and Ubuntu: apt-get install postgresql)")
    return str(request.getfixturevalue("postgres").new_place())


def opener(url: str, opened: list[AdapterStore]) -> Opener:
    """``open_store`` of this URL; what was opened is noted, to be closed."""

    def call(**options: Any) -> AdapterStore:
        store = open_store(url, **options)
        opened.append(store)
        return store

    return call
