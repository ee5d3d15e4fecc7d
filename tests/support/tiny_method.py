"""A planted method of which no fixed set of keys is trained: TinyLoRA (arXiv 2602.04118), with PEFT's type and keys.

::

    W + B (sum_i v_i P_i) A       A (r, in), B (out, r): in the file, frozen; P (u, r, r): from a seed, not in the file
    base_model.tinylora_v.0 ... n                 v (u,), one for each GROUP neighbouring layers
    base_model.model.<layer>.tinylora_A, _B

Its export only gives the vectors their keys: it says nothing of PEFT, for which such a file looks like one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from kilotune import AdapterConfig
from kilotune.config import option
from kilotune.deltas import Delta, LowRank, Role
from kilotune.methods import Export, Kept, Method, Shared, Site
from kilotune.projections.matrices import MATRIX_A, Projections, unit_rows

__all__ = ["GROUP", "Tiny", "TinyConfig", "spread"]

GROUP = 2  # layers that share a vector
A, B, VECTOR = "tinylora_A", "tinylora_B", "tinylora_v"


@final
@dataclass(frozen=True, kw_only=True)
class TinyConfig(AdapterConfig):
    """Options under PEFT's names."""

    peft_type: ClassVar[str] = "TINYLORA"
    bias_modes: ClassVar[tuple[str, ...]] = ("none", "all", "tinylora_only")

    r: int = option(2, "The rank.")
    u: int = option(3, "Numbers of a vector.")
    weight_tying: float = option(0.5, "PEFT's share of layers that share: 0.5 are groups of two.")
    projection_seed: int = option(42, "The seed of P.")
    save_projection: bool = option(False, "Only False here.")

    def faults(self) -> list[str]:
        return []


def spread(seed: int, index: int, u: int, r: int) -> Tensor:
    """P (u, r, r) of the layer ``index``."""
    return torch.from_numpy(unit_rows(seed + index, MATRIX_A, u, r * r).copy()).view(u, r, r)


@final
class _TinyShared(Shared):
    def __init__(self, index: Mapping[str, int]) -> None:
        super().__init__()
        self.index = index


@final
class Tiny(Method[TinyConfig]):
    """Parameters per layer: A and B, frozen. Of the model: a vector for each group of layers."""

    name: ClassVar[str] = "tinylora"
    config_cls: ClassVar[type[AdapterConfig]] = TinyConfig
    makes: type[Delta] = LowRank
    keys: Mapping[str, str] = {A: A, B: B}
    roles: Mapping[str, Role] = {A: Role.FIRST, B: Role.SECOND}

    def __init__(self, config: TinyConfig, loaded: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(config)
        self.loaded = loaded or {}

    @property
    def frozen(self) -> frozenset[str]:
        return frozenset({A, B})

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        return _TinyShared({site.name: i for i, site in enumerate(sites)})

    def init_model(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        start = torch.zeros(self.config.u, device=sites[0].device())
        found = [self.loaded.get(f"{VECTOR}.{group}", start) for group in range(-(-len(sites) // GROUP))]
        return {f"{VECTOR}_{i}": v.clone() for i, v in enumerate(found)}

    def count(self, sites: Sequence[Site]) -> int:
        return self.config.u * -(-len(sites) // GROUP)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        rank, device = self.config.r, site.device()
        return {A: torch.randn(rank, site.inn, device=device), B: torch.randn(site.out, rank, device=device)}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _TinyShared)
        index = shared.index[site.name]
        v = shared.trained[f"{VECTOR}_{index // GROUP}"]  # (u,)
        core = torch.einsum("u,uij->ij", v, spread(self.config.projection_seed, index, self.config.u, self.config.r))
        return LowRank(a=(core @ params[A]).to(site.dtype()), b=params[B].to(site.dtype()))

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        made = super().export(sites, params, shared)
        dotted = {f"{VECTOR}_{i}": f"{VECTOR}.{i}" for i in range(len(shared.trained))}
        return replace(made, tensors={dotted.get(key, key): value for key, value in made.tensors.items()})

    def kept(self, key: str) -> Kept | None:
        return Kept.TRAINED if key.startswith(f"{VECTOR}.") else super().kept(key)

    @classmethod
    def from_file(cls, config: TinyConfig, extra: Mapping[str, Tensor], checksum: str | None) -> Tiny:
        return cls(config, extra)
