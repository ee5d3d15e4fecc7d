"""Frozen places in a layer's matrix, for methods that train numbers there: what FourierFT and WaveFT have in common."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar, final

import torch
from torch import Tensor

from ..config import CLOSED, AdapterConfig, bool_faults, number_fault, option, regex_faults
from ..errors import ConfigError, did_you_mean, gather
from ..name_rules import first_at_end
from ..projections.matrices import SEED_LIMIT, Projections
from ..projections.streams import distinct_places
from ._base import Export, Method, Shared, Site

__all__ = ["AtPlaces", "Places", "PlacesConfig"]

GENERATORS = ("portable", "peft")


@dataclass(frozen=True, kw_only=True)
class PlacesConfig(AdapterConfig, ABC):
    """The options that say how many places there are, and which."""

    n_frequency: int = option(1000, "n: how many numbers a layer trains.")
    n_frequency_pattern: dict[str, int] = option({}, "Other n: layer name or regular expression for its end -> n.")
    scaling: float = option(150.0, "What the change is multiplied by.")
    random_loc_seed: int = option(777, "The seed of the places, 0 ... 2**64 - 1.")
    init_weights: bool = option(True, "True: the spectrum starts at zero, so at the base; False: normal.")
    generator: str = option(
        "portable",
        "Where the places come from: 'portable' (the same everywhere), or 'peft' (those that PEFT draws for this "
        "seed, so that it reads the file).",
        ours=True,
    )
    exclude_modules: Sequence[str] | str | None = option(None, AdapterConfig.help_of("exclude_modules"))

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> Self:
        """PEFT's files mean PEFT's places, and so do ours that are open to it."""
        closed = str(values.get("peft_type")).upper().startswith(CLOSED)
        return cls.from_dict({"generator": "portable" if closed else "peft", **values, **section})

    def faults(self) -> list[str]:
        faults = number_fault("n_frequency", self.n_frequency, low=1, whole=True)
        faults += number_fault("scaling", self.scaling, low=0)
        faults += bool_faults(self, "init_weights")
        if not isinstance(self.n_frequency_pattern, dict):
            faults.append(f"n_frequency_pattern: expected a dictionary, got {self.n_frequency_pattern!r}")
        else:
            for pattern, count in self.n_frequency_pattern.items():
                faults += number_fault(f"n_frequency_pattern[{pattern!r}]", count, low=1, whole=True)
                faults += regex_faults("n_frequency_pattern", pattern)
        seed = self.random_loc_seed
        if type(seed) is not int or not 0 <= seed < SEED_LIMIT:
            faults.append(f"random_loc_seed: expected a whole number in 0 ... 2**64 - 1, got {seed!r}")
        if self.generator not in GENERATORS:
            hint = did_you_mean(str(self.generator), GENERATORS)
            faults.append(f"generator: expected one of {list(GENERATORS)}, got {self.generator!r}.{hint}")
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


C = TypeVar("C", bound=PlacesConfig)


class AtPlaces(Method[C], ABC):
    """A method that trains n numbers of a layer, each at a place of its matrix."""

    by_rows: bool = True

    def frequencies(self, site: Site) -> int:
        """The layer's n: the first of n_frequency_pattern that fits its name, else n_frequency."""
        patterns = self.config.n_frequency_pattern
        return int(first_at_end("n_frequency_pattern", patterns, site.pattern_name, self.config.n_frequency))

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        counted = [(site, self.frequencies(site)) for site in sites]
        faults = [f"{s.name!r}: {n} of {s.out} x {s.inn}" for s, n in counted if n > s.out * s.inn]
        if faults:
            raise ConfigError(gather("n_frequency: more than the layer's matrix has places:", faults))
        shared = Places(self.config.random_loc_seed, self.config.generator)
        for site, count in counted:  # now: a compiled forward cannot draw them
            shared.at(site.out, site.inn, count, site.device())
        return shared

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.frequencies(site) for site in sites)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        return replace(super().export(sites, params, shared), peft=self.config.generator == "peft")
