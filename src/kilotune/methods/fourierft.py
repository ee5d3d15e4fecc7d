"""FourierFT (Gao et al. 2024, arXiv 2405.03003): W + scaling Re(F^-1 S), S with n trained numbers at frozen places.

::

    S (out, in): zero but at n places (u_k, v_k), drawn from a seed, where it has the trained c_k
    F^-1 S at (i, j) = 1 / (out in) sum over k of c_k exp(2 pi i (u_k i / out + v_k j / in))

The places depend on the seed and the layer's shape alone, so layers of one shape have the same, as in the paper. The
change acts by an inverse FFT of the input, n products and an inverse FFT of the output; its matrix is for merging.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, Names, option
from ..deltas import Delta, Full
from ..kernels.lowrank import accumulate_dtype, no_autocast
from ._base import Rate, Shared, Site
from ._places import AtPlaces, Places, PlacesConfig

__all__ = ["FourierFt", "FourierFtConfig"]

SPECTRUM = "fourierft_spectrum"


@final
@dataclass(frozen=True, kw_only=True)
class FourierFtConfig(PlacesConfig):
    """FourierFT's options, under PEFT's names, and one of ours: ``generator``. ``scaling`` is the paper's alpha."""

    peft_type: ClassVar[str] = "FOURIERFT"
    bias_modes: ClassVar[Names] = ("none", "all", "fourier_only")

    init_weights: bool = option(False, "True: the spectrum starts at zero, so at the base; False: normal, as in PEFT.")


@final
class FourierFt(AtPlaces[FourierFtConfig]):
    """Parameters per layer: fourierft_spectrum (n,)."""

    name: ClassVar[str] = "fourierft"
    config_cls: ClassVar[type[AdapterConfig]] = FourierFtConfig
    makes: type[Delta] = Full
    usual_rate: ClassVar[Rate] = Rate(0.1)
    example: ClassVar[Mapping[str, Any]] = {"n_frequency": 7, "init_weights": True}
    keys: Mapping[str, str] = {SPECTRUM: SPECTRUM}

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        spectrum = torch.zeros(self.frequencies(site), device=site.device(), dtype=torch.float32)
        return {SPECTRUM: spectrum if self.config.init_weights else nn.init.normal_(spectrum)}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Full:
        assert isinstance(shared, Places)
        spectrum, gain = params[SPECTRUM], self.config.scaling
        rows, columns = shared.at(site.out, site.inn, spectrum.shape[-1], spectrum.device)

        def build() -> Tensor:
            wide = accumulate_dtype(spectrum.dtype)
            dense = torch.zeros(site.out, site.inn, device=spectrum.device, dtype=wide)
            with no_autocast(spectrum.device):
                wave: Tensor = torch.fft.ifft2(dense.index_put((rows, columns), spectrum.to(wide))).real
                return wave * gain

        def act(x: Tensor) -> Tensor:
            if not x.numel():  # of which there is no FFT
                return x[..., :1].expand(*x.shape[:-1], site.out)
            wide = torch.promote_types(accumulate_dtype(x.dtype), spectrum.dtype)
            with no_autocast(x.device):
                inputs = torch.fft.ifft(x.to(wide)).index_select(-1, columns)  # (..., n)
                shape = (*x.shape[:-1], site.out)
                outputs = inputs.new_zeros(shape).index_add(-1, rows, inputs * spectrum.to(wide))
                wave: Tensor = torch.fft.ifft(outputs).real
                return (wave * gain).to(x.dtype)

        return Full(build, act)
