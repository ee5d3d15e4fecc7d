"""FourierFT (Gao et al. 2024, arXiv 2405.03003): W + scaling Re(F^-1 S), S with n trained numbers at frozen places.

::

    S (out, in): zero but at n places (u_k, v_k), drawn from a seed, where it has the trained c_k
    F^-1 S at (i, j) = 1 / (out in) sum over k of c_k exp(2 pi i (u_k i / out + v_k j / in))

The places depend on the seed and the layer's shape alone, so layers of one shape have the same, as in the paper. The
change acts by an inverse FFT of the input, n products and an inverse FFT of the output; its matrix is for merging.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import CLOSED, AdapterConfig, Names, bool_faults, number_fault, option, regex_faults
from ..deltas import Delta, Full
from ..errors import ConfigError, gather
from ..kernels.lowrank import accumulate_dtype, no_autocast
from ..name_rules import first_at_end
from ..projections.matrices import Projections
from ._base import Export, Method, Rate, Shared, Site
from ._places import Places, generator_option, place_faults

__all__ = ["FourierFt", "FourierFtConfig"]

SPECTRUM = "fourierft_spectrum"


@final
@dataclass(frozen=True, kw_only=True)
class FourierFtConfig(AdapterConfig):
    """FourierFT's options, under PEFT's names, and one of ours: ``generator``."""

    peft_type: ClassVar[str] = "FOURIERFT"
    bias_modes: ClassVar[Names] = ("none", "all", "fourier_only")

    n_frequency: int = option(1000, "n: how many numbers a layer trains.")
    n_frequency_pattern: dict[str, int] = option({}, "Other n: layer name or regular expression for its end -> n.")
    scaling: float = option(150.0, "What the change is multiplied by (the paper's alpha).")
    random_loc_seed: int = option(777, "The seed of the places, 0 ... 2**64 - 1.")
    init_weights: bool = option(False, "True: the spectrum starts at zero, so at the base; False: normal, as in PEFT.")
    generator: str = generator_option()
    exclude_modules: Sequence[str] | str | None = option(None, AdapterConfig.help_of("exclude_modules"))

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> FourierFtConfig:
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
        return faults + place_faults(self.random_loc_seed, self.generator)


@final
class FourierFt(Method[FourierFtConfig]):
    """Parameters per layer: fourierft_spectrum (n,)."""

    name: ClassVar[str] = "fourierft"
    config_cls: ClassVar[type[AdapterConfig]] = FourierFtConfig
    makes: type[Delta] = Full
    by_rows: bool = True
    usual_rate: ClassVar[Rate] = Rate(0.1)
    example: ClassVar[Mapping[str, Any]] = {"n_frequency": 7, "init_weights": True}
    keys: Mapping[str, str] = {SPECTRUM: SPECTRUM}

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

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        return replace(super().export(sites, params, shared), peft=self.config.generator == "peft")
