"""BitFit (Zaken et al. 2022, arXiv 2106.10199): only biases are trained, and the weights stay as they are.

The paper trains every bias of the model and the task's head: ``target_modules="all-biased"``, the default here,
and ``modules_to_save`` or ``task_type`` for the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from ..config import ALL_BIASED, ALL_LINEAR, AdapterConfig, Names, option
from ..deltas import Delta, Shift
from ._base import Method, Rate, Shared, Site

__all__ = ["Bitfit", "BitfitConfig"]


@final
@dataclass(frozen=True, kw_only=True)
class BitfitConfig(AdapterConfig):
    """BitFit's options: which layers, and nothing else."""

    peft_type: ClassVar[str] = "BITFIT"
    usual_targets: ClassVar[str | None] = None  # the method's own places
    bias_modes: ClassVar[Names] = ("none",)
    target_words: ClassVar[Names] = (ALL_LINEAR, ALL_BIASED)

    target_modules: Sequence[str] | str | None = option(
        ALL_BIASED,
        "Which modules to adapt: 'all-biased' (every layer that has a bias, norms included), or a list of names, a "
        "regular expression or 'all-linear', which also take layers without a bias; merging gives those one.",
    )
    bias: str = option("none", "Only 'none': the method itself trains the biases.")

    def faults(self) -> list[str]:
        return [] if self.bias == "none" else ["bias: BitFit trains the biases itself, so leave this option out"]


@final
class Bitfit(Method[BitfitConfig]):
    """Parameters per layer: bitfit_delta (out,), the change of the bias, which starts at zero."""

    name: ClassVar[str] = "bitfit"
    config_cls: ClassVar[type[AdapterConfig]] = BitfitConfig
    makes: type[Delta] = Shift
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(1e-2)
    keys: Mapping[str, str] = {"bitfit_delta": "bitfit_delta"}

    def count(self, sites: Sequence[Site]) -> int:
        return sum(site.out for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        return {"bitfit_delta": torch.zeros(site.out, device=site.device(), dtype=torch.float32)}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Shift:
        return Shift(params["bitfit_delta"])
