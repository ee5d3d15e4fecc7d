"""Test-only methods that make the deltas which no listed method makes yet: Full, Rescale, Shift, Residual.

They are in METHODS while a conformance test runs (see conftest.py), so the whole suite runs on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from kilotune import AdapterConfig
from kilotune.config import option
from kilotune.deltas import Delta, Full, LowRank, Rescale, Residual, Shift
from kilotune.methods import Method, Shared, Site

WIDTH = 3


@final
@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOY_FULL"

    def faults(self) -> list[str]:
        return []


@final
class ToyFull(Method[FullConfig]):
    name: ClassVar[str] = "toy_full"
    config_cls: ClassVar[type[AdapterConfig]] = FullConfig
    makes: ClassVar[type[Delta]] = Full
    keys: ClassVar[dict[str, str]] = {"change": "toy_change"}

    def count(self, sites: Sequence[Site]) -> int:
        return sum(site.out * site.inn for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        return {"change": torch.zeros(site.out, site.inn, device=site.device())}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Full:
        return Full(params["change"])


@final
@dataclass(frozen=True, kw_only=True)
class RescaleConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOY_RESCALE"

    rows: bool = option(False, "Scale the outputs.")
    cols: bool = option(False, "Scale the inputs.")
    inner: str = option("", "'', 'low_rank' or 'full'.")
    scale_bias: bool = option(False, "The rows scale the bias too.")

    def faults(self) -> list[str]:
        return []


@final
class ToyRescale(Method[RescaleConfig]):
    name: ClassVar[str] = "toy_rescale"
    config_cls: ClassVar[type[AdapterConfig]] = RescaleConfig
    makes: ClassVar[type[Delta]] = Rescale
    keys: ClassVar[dict[str, str]] = {name: f"toy_{name}" for name in ("rows", "cols", "a", "b", "change")}

    def count(self, sites: Sequence[Site]) -> int:
        config = self.config
        inner = {"": lambda site: 0, "full": lambda site: site.out * site.inn}
        of_inner = inner.get(config.inner, lambda site: WIDTH * (site.out + site.inn))
        return sum(site.out * config.rows + site.inn * config.cols + of_inner(site) for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        device, made = site.device(), {}
        if self.config.rows:
            made["rows"] = torch.ones(site.out, device=device)
        if self.config.cols:
            made["cols"] = torch.ones(site.inn, device=device)
        if self.config.inner == "low_rank":
            made["a"] = torch.ones(WIDTH, site.inn, device=device)
            made["b"] = torch.zeros(site.out, WIDTH, device=device)
        if self.config.inner == "full":
            made["change"] = torch.zeros(site.out, site.inn, device=device)
        return made

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Rescale:
        dtype = site.dtype()
        inner: LowRank | Full | None = None
        if "a" in params:
            inner = LowRank(params["a"].to(dtype), params["b"].to(dtype), scale=2.0)
        if "change" in params:
            inner = Full(params["change"])
        return Rescale(inner, params.get("rows"), params.get("cols"), self.config.scale_bias)


@final
@dataclass(frozen=True, kw_only=True)
class ShiftConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOY_SHIFT"

    def faults(self) -> list[str]:
        return []


@final
class ToyShift(Method[ShiftConfig]):
    name: ClassVar[str] = "toy_shift"
    config_cls: ClassVar[type[AdapterConfig]] = ShiftConfig
    makes: ClassVar[type[Delta]] = Shift
    keys: ClassVar[dict[str, str]] = {"shift": "toy_shift"}

    def count(self, sites: Sequence[Site]) -> int:
        return sum(site.out for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        return {"shift": torch.zeros(site.out, device=site.device())}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Shift:
        return Shift(params["shift"])


@final
@dataclass(frozen=True, kw_only=True)
class ResidualConfig(AdapterConfig):
    peft_type: ClassVar[str] = "TOY_RESIDUAL"

    source: str = option("output", "'output' or 'input'.")

    def faults(self) -> list[str]:
        return []


@final
class ToyResidual(Method[ResidualConfig]):
    name: ClassVar[str] = "toy_residual"
    config_cls: ClassVar[type[AdapterConfig]] = ResidualConfig
    makes: ClassVar[type[Delta]] = Residual
    keys: ClassVar[dict[str, str]] = {"down": "toy_down.weight", "up": "toy_up.weight"}

    def count(self, sites: Sequence[Site]) -> int:
        return sum(
            WIDTH * (site.output + (site.output if self.config.source == "output" else site.inn)) for site in sites
        )

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        features = site.output if self.config.source == "output" else site.inn
        return {
            "down": torch.ones(WIDTH, features, device=site.device()) / 4,
            "up": torch.zeros(site.output, WIDTH, device=site.device()),
        }

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Residual:
        source = "output" if self.config.source == "output" else "input"
        return Residual(params["down"], params["up"], torch.tanh, source)


TOYS: dict[str, type[Method]] = {toy.name: toy for toy in (ToyFull, ToyRescale, ToyShift, ToyResidual)}
