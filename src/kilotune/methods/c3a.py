"""C3A (Chen et al. 2024, arXiv 2407.19342): W + C / in, where C is made of circulant blocks.

::

    C = | C(w_11) ... C(w_1n) |      C(w) (b, b): row i, column j is w_((j - i) mod b)
        |   ...               |
        | C(w_m1) ... C(w_mn) |      m = out / b, n = in / b; out in / b numbers are trained

A circulant block times a vector is a correlation, so the change acts by FFT, in O((m + n) b log b + m n b) for each
input, and its matrix is built for merging alone. A C of b numbers may have full rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, Names, number_fault, option, regex_faults
from ..deltas import Delta, Full
from ..errors import ConfigError, did_you_mean, gather
from ..kernels.lowrank import accumulate_dtype, no_autocast
from ..name_rules import first_at_end
from ..projections.matrices import Projections
from ._base import Export, Method, Rate, Shared, Site

__all__ = ["C3a", "C3aConfig"]

KERNEL = "c3a_kernel"
STARTS = ("gaussian", "kaiming_uniform", "xavier_uniform")


@final
@dataclass(frozen=True, kw_only=True)
class C3aConfig(AdapterConfig):
    """C3A's options, under PEFT's names."""

    peft_type: ClassVar[str] = "C3A"
    bias_modes: ClassVar[Names] = ("none", "all", "c3a_only")

    block_size: int = option(
        256, "b, a divisor of each layer's in and out; larger ones train fewer numbers, out in / b a layer."
    )
    block_size_pattern: dict[str, int] = option({}, "Other sizes: layer name or regular expression for its end -> b.")
    init_weights: bool | str | None = option(
        "xavier_uniform",
        "'xavier_uniform' (False is the same), 'kaiming_uniform', 'gaussian', or True for zeros: then the start is the "
        "base.",
    )
    fan_in_fan_out: bool = option(False, AdapterConfig.help_of("fan_in_fan_out"), ours=True)

    def faults(self) -> list[str]:
        faults = number_fault("block_size", self.block_size, low=1, whole=True)
        if not isinstance(self.block_size_pattern, dict):
            faults.append(f"block_size_pattern: expected a dictionary, got {self.block_size_pattern!r}")
        else:
            for pattern, size in self.block_size_pattern.items():
                faults += number_fault(f"block_size_pattern[{pattern!r}]", size, low=1, whole=True)
                faults += regex_faults("block_size_pattern", pattern)
        start = self.init_weights
        if not isinstance(start, bool) and start not in STARTS:
            hint = did_you_mean(start, STARTS) if isinstance(start, str) else ""
            faults.append(f"init_weights: expected True, False or one of {list(STARTS)}, got {start!r}.{hint}")
        return faults


@final
class C3a(Method[C3aConfig]):
    """Parameters per layer: c3a_kernel (out / b, in / b, b)."""

    name: ClassVar[str] = "c3a"
    config_cls: ClassVar[type[AdapterConfig]] = C3aConfig
    makes: type[Delta] = Full
    by_rows: bool = True
    usual_rate: ClassVar[Rate] = Rate(0.3)
    example: ClassVar[Mapping[str, Any]] = {"block_size": 1, "init_weights": True}
    keys: Mapping[str, str] = {KERNEL: KERNEL}

    def size(self, site: Site) -> int:
        """The layer's b: the first of block_size_pattern that fits its name, else block_size."""
        patterns = self.config.block_size_pattern
        return int(first_at_end("block_size_pattern", patterns, site.pattern_name, self.config.block_size))

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        faults = []
        for site in sites:
            if site.out % (size := self.size(site)) or site.inn % size:
                most = math.gcd(site.out, site.inn)
                faults.append(f"{site.name!r}: {size} for ({site.out}, {site.inn}), which have the divisors of {most}")
        if faults:
            raise ConfigError(gather("block_size: expected a divisor of each layer's out and in:", faults))
        return Shared()

    def count(self, sites: Sequence[Site]) -> int:
        return sum(site.out * site.inn // self.size(site) for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        size, start = self.size(site), self.config.init_weights
        kernel = torch.zeros(site.out // size, site.inn // size, size, device=site.device(), dtype=torch.float32)
        if start == "gaussian":
            nn.init.normal_(kernel)
        elif start == "kaiming_uniform":
            nn.init.uniform_(kernel, -((1 / site.inn) ** 0.5), (1 / site.inn) ** 0.5)
        elif start is not True:
            most = math.sqrt(6 / (site.inn + site.out))
            nn.init.uniform_(kernel, -most, most)
        return {KERNEL: kernel}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> Full:
        kernel, gain = params[KERNEL], 1 / site.inn
        return Full(lambda: circulant(kernel) * gain, lambda x: correlate(kernel, x) * gain)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        return replace(super().export(sites, params, shared), peft=True)


def circulant(kernel: Tensor) -> Tensor:
    """The matrix (m b, n b) of kernels (m, n, b): block (i, j) has w_((column - row) mod b)."""
    m, n, size = kernel.shape
    places = torch.arange(size, device=kernel.device)
    blocks = kernel[..., (places - places.unsqueeze(1)) % size]  # (m, n, b, b)
    return blocks.transpose(-3, -2).reshape(m * size, n * size)


def correlate(kernel: Tensor, x: Tensor) -> Tensor:
    """The circulant matrix of kernels (..., m, n, b) times x (..., n b), in at least float32: (..., m b)."""
    size, wide = kernel.shape[-1], torch.promote_types(accumulate_dtype(x.dtype), kernel.dtype)
    if not x.numel():  # of which there is no FFT
        return x[..., :1].expand(*x.shape[:-1], kernel.shape[-3] * size)
    with no_autocast(x.device):
        spectra = torch.fft.rfft(kernel.to(wide)).conj()  # (..., m, n, b / 2 + 1)
        inputs = torch.fft.rfft(x.to(wide).reshape(*x.shape[:-1], -1, size))  # (..., n, b / 2 + 1)
        outputs = torch.einsum("...mnf,...nf->...mf", spectra, inputs)
        y: Tensor = torch.fft.irfft(outputs, n=size)  # (..., m, b)
        return y.flatten(-2).to(x.dtype)
