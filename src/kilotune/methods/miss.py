"""MiSS (Kang and Yin 2024, arXiv 2409.15371): column j of W gets column (j mod r) of one trained matrix (out, r).

::

    y = W x + D^T s,   s_k = the sum of all x_j with j mod r = k,   D (r, out)

So it is of rank r with a first factor of zeros and ones: half of LoRA's numbers at the same rank. ``mini``: D is
(r, m), and its m columns are repeated along the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, Names, number_fault, option, rate_fault
from ..deltas import Delta, LowRank
from ..errors import ConfigError, did_you_mean, gather
from ..projections.matrices import Projections
from ._base import Export, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["Miss", "MissConfig"]

BLOCK = "miss_block"
STARTS = ("mini",)


@final
@dataclass(frozen=True, kw_only=True)
class MissConfig(LowRankConfig):
    """MiSS's options, under PEFT's names; its ``init_weights="bat"`` is not here."""

    peft_type: ClassVar[str] = "MISS"
    bias_modes: ClassVar[Names] = ("none", "all", "MiSS_only")

    r: int = option(64, "The rank, at most a layer's in; r out numbers are trained.")
    miss_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1).")
    mini_r: int = option(1, "With init_weights='mini': m, a divisor of each layer's out; r m numbers are trained.")
    init_weights: bool | str = option(
        True, "True: zeros. False: Kaiming uniform, so not at the base. 'mini': zeros, and one block of m columns."
    )
    exclude_modules: Sequence[str] | str | None = option(None, AdapterConfig.help_of("exclude_modules"))
    fan_in_fan_out: bool = option(False, AdapterConfig.help_of("fan_in_fan_out"), ours=True)

    @property
    def dropout(self) -> float:
        return self.miss_dropout

    @property
    def mini(self) -> bool:
        """Whether a layer has one block of ``mini_r`` columns."""
        return self.init_weights == "mini"

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("mini_r", self.mini_r, low=1, whole=True)
        faults += rate_fault("miss_dropout", self.miss_dropout)
        start = self.init_weights
        if start == "bat":
            faults.append(
                "init_weights='bat': multiplies blocks of the base's weight by the trained ones, which is not here; "
                "take True, or 'mini' for fewer numbers"
            )
        elif not isinstance(start, bool) and start not in STARTS:
            hint = did_you_mean(start, STARTS) if isinstance(start, str) else ""
            faults.append(f"init_weights: expected True, False or 'mini', got {start!r}.{hint}")
        if self.mini_r != 1 and start != "mini":
            faults.append("mini_r: has no effect without init_weights='mini'")
        return faults


@final
class _Sums(Shared):
    """The first factors of zeros and ones (r, in), by width, device and dtype."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self._made: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @torch.inference_mode(False)  # tensors made in inference mode could never serve a training step
    def over(self, site: Site) -> Tensor:
        key = (site.inn, site.device(), site.dtype())
        if key not in self._made:
            places = torch.arange(site.inn, device=site.device()) % self.rank
            ones = places == torch.arange(self.rank, device=site.device()).unsqueeze(1)
            self._made[key] = ones.to(site.dtype())
        return self._made[key]


@final
class Miss(Method[MissConfig]):
    """Parameters per layer: miss_block (r, out), or with 'mini' (r, mini_r)."""

    name: ClassVar[str] = "miss"
    config_cls: ClassVar[type[AdapterConfig]] = MissConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(7e-3)
    example: ClassVar[Mapping[str, Any]] = {"r": 2}
    keys: Mapping[str, str] = {BLOCK: BLOCK}

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        config = self.config
        faults = [f"{s.name!r}: r = {config.r}, in = {s.inn}" for s in sites if config.r > s.inn]
        if config.mini:
            odd = [site for site in sites if site.out % config.mini_r]
            faults += [f"{site.name!r}: mini_r = {config.mini_r} is no divisor of out = {site.out}" for site in odd]
        if faults:
            raise ConfigError(gather("miss: the block does not fit these layers:", faults))
        shared = _Sums(config.r)
        for site in sites:  # now: a compiled forward would make them each time
            shared.over(site)
        return shared

    def count(self, sites: Sequence[Site]) -> int:
        config = self.config
        return sum(config.r * (config.mini_r if config.mini else site.out) for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        columns = self.config.mini_r if self.config.mini else site.out
        block = torch.zeros(self.config.r, columns, device=site.device(), dtype=torch.float32)
        return {BLOCK: nn.init.kaiming_uniform_(block, a=math.sqrt(5)) if self.config.init_weights is False else block}

    def first_factor(self, site: Site, shared: Shared) -> Hashable | None:
        return "miss", self.config.r, site.inn, site.dtype(), site.device()

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _Sums)
        a, block = shared.over(site), params[BLOCK]  # (r, in), (..., r, out or m)
        if self.config.mini:
            block = _repeated(block, site.out)
        b = block.mT.to(site.dtype())  # (..., out, r)
        return LowRank(a=a if b.ndim == 2 else a.expand(b.shape[0], *a.shape), b=b)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        return replace(super().export(sites, params, shared), peft=True)


def _repeated(block: Tensor, out: int) -> Tensor:
    """(..., r, m) again and again along the outputs: (..., r, out)."""
    times = out // block.shape[-1]
    return block.repeat(*(1,) * (block.ndim - 1), times)
