"""LoRA (Hu et al. 2021, arXiv 2106.09685): W + (alpha / r) B A, both factors trained.

With ``use_rslora`` the scale is alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault, regex_faults
from ..deltas import Delta, LowRank, Role
from ..kernels.starts import orthogonal
from ..name_rules import first_at_end
from ._base import Export, LowRankConfig, Method, Shared, Site

__all__ = ["Lora", "LoraConfig"]

INITS = (True, False, "gaussian", "orthogonal")
NAMED = "'gaussian' or 'orthogonal'"


@final
@dataclass(frozen=True, kw_only=True)
class LoraConfig(LowRankConfig):
    """LoRA's options, under PEFT's names."""

    peft_type: ClassVar[str] = "LORA"
    bias_modes: ClassVar[Names] = ("none", "all", "lora_only")

    r: int = option(8, "The rank.")
    lora_alpha: float = option(8, "The scale is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.")
    lora_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1); none at an embedding, as in PEFT.")
    use_rslora: bool = option(False, "Scale by lora_alpha / sqrt(r).")
    init_lora_weights: bool | str = option(
        True,
        "True: A Kaiming uniform with a = sqrt(5), B zero. 'gaussian': A normal with deviation 1 / r, B zero. "
        "False: both Kaiming uniform, so the adapter changes the output from the start. 'orthogonal': neither is zero, "
        "their product is; r must be even. At an embedding the last one is as True, as in PEFT.",
    )
    use_dora: bool = option(False, LowRankConfig.help_of("use_dora"))
    lora_fa: bool = option(
        False,
        "LoRA-FA: A stays as it started, at random, and only B is trained: r * out numbers a layer, and a backward "
        "that keeps r numbers of each input in place of all.",
        ours=True,
    )
    rank_pattern: dict[str, int] = option({}, "Other ranks: layer name or regular expression for its end -> r.")
    alpha_pattern: dict[str, float] = option({}, "Other alphas: layer name or regular expression -> lora_alpha.")
    exclude_modules: Sequence[str] | str | None = option(None, AdapterConfig.help_of("exclude_modules"))
    target_parameters: Sequence[str] | None = option(None, AdapterConfig.help_of("target_parameters"))

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> LoraConfig:
        """PEFT's starts that leave the base's weights alone do not matter any more: the file has what came of them."""
        if values.get("init_lora_weights") == "eva":
            values = {**{k: v for k, v in values.items() if k != "eva_config"}, "init_lora_weights": True}
        return cls.from_dict({**values, **section})

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("lora_alpha", self.lora_alpha, low=0)
        faults += rate_fault("lora_dropout", self.lora_dropout)
        faults += bool_faults(self, "use_rslora", "lora_fa")
        # By type too: 0 == False, but a 0 here is a mistake.
        if not any(type(self.init_lora_weights) is type(v) and self.init_lora_weights == v for v in INITS):
            faults.append(f"init_lora_weights: expected True, False, {NAMED}, got {self.init_lora_weights!r}")
        faults += self._pattern_faults()
        return faults or self._start_faults()

    def _start_faults(self) -> list[str]:
        """What the start asks of the other options, which are right by themselves."""
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}}
        odd = [f"{name} = {rank}" for name, rank in ranks.items() if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            return [f"init_lora_weights='orthogonal': needs even ranks, got {', '.join(odd)}"]
        return []

    def _pattern_faults(self) -> list[str]:
        faults = []
        for name, patterns, whole in (
            ("rank_pattern", self.rank_pattern, True),
            ("alpha_pattern", self.alpha_pattern, False),
        ):
            if not isinstance(patterns, dict):
                faults.append(f"{name}: expected a dictionary, got {patterns!r}")
                continue
            for pattern, value in patterns.items():
                faults += number_fault(f"{name}[{pattern!r}]", value, low=1 if whole else 0, whole=whole)
                faults += regex_faults(name, pattern)
        return faults


@final
class Lora(Method[LoraConfig]):
    """Parameters per layer: lora_A (r, in) and lora_B (out, r)."""

    name: ClassVar[str] = "lora"
    config_cls: ClassVar[type[AdapterConfig]] = LoraConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    keys: Mapping[str, str] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    roles: Mapping[str, Role] = {"lora_A": Role.FIRST, "lora_B": Role.SECOND}
    default_targets: Mapping[str, Sequence[str]] = {"phi": ("q_proj", "v_proj", "fc1", "fc2")}

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config)
        self._ranks: dict[str, int] = {}  # by name, where there are patterns
        self._alphas: dict[str, float] = {}

    @property
    def frozen(self) -> frozenset[str]:
        """With lora_fa, the first factor (Zhang et al. 2023, arXiv 2308.03303)."""
        return frozenset({"lora_A"} if self.config.lora_fa else ())

    def rank(self, site: Site) -> int:
        """The layer's rank: the first of rank_pattern that fits its name, else r."""
        return int(self._found(self._ranks, "rank_pattern", site.pattern_name, self.config.r))

    def scale(self, site: Site) -> float:
        """Alpha / r, or alpha / sqrt(r) with use_rslora."""
        rank = self.rank(site)
        config = self.config
        alpha = float(self._found(self._alphas, "alpha_pattern", site.pattern_name, config.lora_alpha))
        return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank

    def _found(self, known: dict[str, Any], field: str, name: str, default: Any) -> Any:
        """PEFT's rule: the first pattern that is the whole name, or its end after a dot. Looked for once: this is asked
        for in every forward."""
        patterns: Mapping[str, Any] = getattr(self.config, field)
        if not patterns:
            return default
        if name not in known:
            known[name] = first_at_end(field, patterns, name, default)
        return known[name]

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        rank, device, kind = self.rank(site), site.device(), self.config.init_lora_weights
        a = torch.empty(rank, site.inn, device=device, dtype=torch.float32)
        b = torch.zeros(site.out, rank, device=device, dtype=torch.float32)
        if site.fan_in < site.inn:  # an embedding: PEFT starts with A at zero and B normal, or with both normal
            if self.config.lora_fa:  # a frozen A of zeros would do nothing for ever, so B starts at zero
                return {"lora_A": nn.init.normal_(a), "lora_B": nn.init.normal_(b) if kind is False else b}
            return {"lora_A": nn.init.normal_(a) if kind is False else a.zero_(), "lora_B": nn.init.normal_(b)}
        if kind == "orthogonal":
            a, b = orthogonal(rank, site.out, site.inn, device)
        elif kind == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if kind is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        return {"lora_A": a, "lora_B": b}

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        """PEFT reads the file as plain LoRA: that A was frozen changes nothing that a trained adapter does."""
        made = replace(super().export(sites, params, shared), peft=True)
        return replace(made, header={"lora_fa": True}) if self.config.lora_fa else made

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        dtype = site.dtype()  # a 16-bit base never runs float32 products
        return LowRank(a=params["lora_A"].to(dtype), b=params["lora_B"].to(dtype), scale=self.scale(site))
