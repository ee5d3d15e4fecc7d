"""Frozen places in a layer's matrix, for methods that train numbers there (FourierFT, WaveFT)."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from ..config import option
from ..errors import did_you_mean
from ..projections.matrices import SEED_LIMIT
from ..projections.streams import distinct_places
from ._base import Shared

__all__ = ["Places", "generator_option", "place_faults"]

GENERATORS = ("portable", "peft")


def generator_option() -> Any:
    """The option of such a method that says who draws the places."""
    return option(
        "portable",
        "Where the places come from: 'portable' (the same everywhere), or 'peft' (those that PEFT draws for this "
        "seed, so that it reads the file).",
        ours=True,
    )


def place_faults(seed: Any, generator: Any) -> list[str]:
    """What is wrong with the options ``random_loc_seed`` and ``generator``."""
    faults = []
    if type(seed) is not int or not 0 <= seed < SEED_LIMIT:
        faults.append(f"random_loc_seed: expected a whole number in 0 ... 2**64 - 1, got {seed!r}")
    if generator not in GENERATORS:
        hint = did_you_mean(str(generator), GENERATORS)
        faults.append(f"generator: expected one of {list(GENERATORS)}, got {generator!r}.{hint}")
    return faults


@final
class Places(Shared):
    """The places of a layer by its shape: rows (n,) and columns (n,), int64, kept on each device; no two are alike."""

    def __init__(self, seed: int, generator: str) -> None:
        super().__init__()
        self.seed, self.generator = seed, generator
        self._made: dict[tuple[int, int, int, torch.device], tuple[Tensor, Tensor]] = {}

    @torch.inference_mode(False)  # tensors made in inference mode could never serve a training step
    def at(self, out: int, inn: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``count`` places of a matrix (out, in)."""
        key = (out, inn, count, device)
        if key not in self._made:
            flat = self._drawn(out * inn, count, device)
            self._made[key] = flat // inn, flat % inn
        return self._made[key]

    def _drawn(self, total: int, count: int, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(count, dtype=torch.int64, device=device)
        if self.generator == "portable":
            return torch.from_numpy(distinct_places(self.seed, total, count)).to(device)
        drawn = torch.Generator().manual_seed(self.seed)
        return torch.randperm(total, generator=drawn, device="cpu")[:count].to(device)
