"""WaveFT (Bilican et al. 2025, arXiv 2505.12532): W + scaling R S C^T, S with n trained numbers at frozen places.

::

    S (H, W): out and in, each rounded up to even; zero but at n places, drawn from a seed; its upper right part
              (differences along the outputs) and its lower left one stand in each other's place
    R, C: a level of the inverse Haar transform: numbers i and H / 2 + i of a column make its entries 2 i and 2 i + 1,
          (low + high) / sqrt(2) and (low - high) / sqrt(2); what stands beyond (out, in) is dropped

So a number changes a block of 2 x 2 weights. The change acts by the transform of the input, n products and that of the
output; its matrix is for merging. ``use_idwt=False``: S alone, a sparse change. Of PEFT's wavelet families this is
``db1``, its default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AdapterConfig, Names, bool_faults, option
from ..deltas import Delta, Full
from ..kernels.lowrank import accumulate_dtype
from ._base import Rate, Shared, Site
from ._places import AtPlaces, Places, PlacesConfig

__all__ = ["WaveFt", "WaveFtConfig"]

SPECTRUM = "waveft_spectrum"
SPREAD = 0.01  # of a spectrum that does not start at zero, as in PEFT


@final
@dataclass(frozen=True, kw_only=True)
class WaveFtConfig(PlacesConfig):
    """WaveFT's options, under PEFT's names, and one of ours: ``generator``."""

    peft_type: ClassVar[str] = "WAVEFT"
    bias_modes: ClassVar[Names] = ("none", "all", "waveft_only")

    n_frequency: int = option(2592, PlacesConfig.help_of("n_frequency"))
    proportional_parameters: bool = option(False, "Kept for PEFT: False; name other n in n_frequency_pattern.")
    scaling: float = option(25.0, PlacesConfig.help_of("scaling"))
    wavelet_family: str = option("db1", "The wavelet: 'db1', which is Haar's.")
    use_idwt: bool = option(True, "False: the numbers are those of the weight itself, without a transform.")
    init_weights: bool = option(True, "True: the spectrum starts at zero, so at the base; False: normal, times 0.01.")

    def faults(self) -> list[str]:
        faults = bool_faults(self, "use_idwt", "proportional_parameters")
        if self.wavelet_family != "db1":
            faults.append(f"wavelet_family: expected 'db1' (Haar), the one that is here, got {self.wavelet_family!r}")
        if self.proportional_parameters is True:
            faults.append("proportional_parameters: is not here; give each layer's n in n_frequency_pattern")
        return super().faults() + faults


@final
class WaveFt(AtPlaces[WaveFtConfig]):
    """Parameters per layer: waveft_spectrum (n,)."""

    name: ClassVar[str] = "waveft"
    config_cls: ClassVar[type[AdapterConfig]] = WaveFtConfig
    makes: type[Delta] = Full
    usual_rate: ClassVar[Rate] = Rate(2e-2)
    example: ClassVar[Mapping[str, Any]] = {"n_frequency": 7}
    keys: Mapping[str, str] = {SPECTRUM: SPECTRUM}

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        spectrum = torch.zeros(self.frequencies(site), device=site.device(), dtype=torch.float32)
        return {SPECTRUM: spectrum if self.config.init_weights else nn.init.normal_(spectrum, std=SPREAD)}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Full:
        assert isinstance(shared, Places)
        spectrum, gain, waves = params[SPECTRUM], self.config.scaling, self.config.use_idwt
        rows, columns = shared.at(site.out, site.inn, spectrum.shape[-1], spectrum.device)
        height, width = site.out, site.inn
        if waves:
            height, width = height + height % 2, width + width % 2
            rows, columns = _crossed(rows, columns, height // 2, width // 2)

        def build() -> Tensor:
            dense = torch.zeros(height, width, device=spectrum.device, dtype=accumulate_dtype(spectrum.dtype))
            dense = dense.index_put((rows, columns), spectrum.to(dense.dtype))
            if waves:
                dense = merged(merged(dense).mT).mT[: site.out, : site.inn]
            return dense * gain

        def act(x: Tensor) -> Tensor:
            wide = x.to(torch.promote_types(accumulate_dtype(x.dtype), spectrum.dtype))
            inputs = (split(wide) if waves else wide).index_select(-1, columns)  # (..., n)
            outputs = inputs.new_zeros(*x.shape[:-1], height).index_add(-1, rows, inputs * spectrum.to(wide.dtype))
            return ((merged(outputs)[..., : site.out] if waves else outputs) * gain).to(x.dtype)

        return Full(build, act)


def _crossed(rows: Tensor, columns: Tensor, half_out: int, half_in: int) -> tuple[Tensor, Tensor]:
    """Places as the transform takes them: of the four parts of S the second and the third change their roles.

    In PEFT, which follows the order of wavelet libraries, the upper right part is of differences along the outputs and
    sums along the inputs.
    """
    differs_in, differs_out = rows >= half_out, columns >= half_in
    return rows % half_out + half_out * differs_out, columns % half_in + half_in * differs_in


def split(x: Tensor) -> Tensor:
    """Haar's transform of the last axis: the sums of pairs, then their differences, over sqrt(2); an odd one gets 0."""
    x = F.pad(x, (0, x.shape[-1] % 2))
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first + second, first - second], dim=-1) * math.sqrt(0.5)


def merged(x: Tensor) -> Tensor:
    """The inverse of :func:`split`, of an even number."""
    low, high = x.chunk(2, dim=-1)
    return torch.stack([low + high, low - high], dim=-1).flatten(-2) * math.sqrt(0.5)
