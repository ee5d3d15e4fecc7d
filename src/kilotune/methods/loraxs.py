"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): W + (alpha / r) B R A, and only R (r, r) is trained.

A (r, in) and B (out, r) are frozen: A the top r right singular vectors of the layer's own weight, B the left ones
times the singular values (the paper), or random matrices from a seed, which all layers share (``start="random"``).
R starts normal with deviation 1e-5, as in the paper's code, so that it gets a gradient wherever B and A do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault
from ..deltas import Delta, LowRank, Role
from ..errors import CheckpointError, ConfigError, did_you_mean, gather
from ..projections.matrices import MATRIX_A, SEED_LIMIT, Extent, PortableSource, Projections, unit_rows
from ._base import Export, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["LoraXs", "LoraXsConfig", "frozen_factors"]

STARTS = ("svd", "random")
SPREAD = 1e-5  # of R at its start
OVERSAMPLING = 10
# Factors keep this many binary digits, so that machines whose arithmetic differs in the last ones get the same bits.
DIGITS = 12
FIRST, SECOND, CORE = "loraxs_A", "loraxs_B", "loraxs_R"


@final
@dataclass(frozen=True, kw_only=True)
class LoraXsConfig(LowRankConfig):
    """LoRA-XS's options. PEFT has no such method, so its files are ours."""

    peft_type: ClassVar[str] = "LORAXS"
    bias_modes: ClassVar[Names] = ("none", "all", "loraxs_only")

    r: int = option(16, "The rank; a layer trains r x r numbers.")
    lora_alpha: float = option(16, "The scale is lora_alpha / r.")
    loraxs_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1).")
    start: str = option(
        "svd",
        "Where the frozen factors come from: 'svd' of the layer's weight (the paper), or 'random' matrices from the "
        "seed, which take no memory of their own and nothing in a file.",
    )
    svd_iterations: int = option(
        10,
        "Power iterations of the randomised SVD (10 in the paper's code). 0: the exact SVD, which takes far longer for "
        "large layers; small ones get it anyway.",
    )
    save_factors: bool = option(
        True,
        "With start='svd', write the frozen factors into the file, r (in + out) numbers a layer, so that it loads on "
        "the base in any dtype or quantisation. False: r x r numbers and a checksum; the factors are made again from "
        "the base, and loading is refused where they come out otherwise.",
    )
    projection_prng_key: int = option(0, "The seed of the randomised SVD, or of the random factors; 0 ... 2**64 - 1.")

    @property
    def dropout(self) -> float:
        return self.loraxs_dropout

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("lora_alpha", self.lora_alpha, low=0)
        faults += rate_fault("loraxs_dropout", self.loraxs_dropout)
        faults += number_fault("svd_iterations", self.svd_iterations, low=0, high=1000, whole=True)
        faults += bool_faults(self, "save_factors")
        if self.start not in STARTS:
            faults.append(
                f"start: expected one of {list(STARTS)}, got {self.start!r}.{did_you_mean(str(self.start), STARTS)}"
            )
        if self.start == "random":
            if self.save_factors is not True:
                faults.append("save_factors: has no effect with start='random', whose factors are never in a file")
            if self.svd_iterations != 10:
                faults.append("svd_iterations: has no effect with start='random'")
        key = self.projection_prng_key
        if type(key) is not int or not 0 <= key < SEED_LIMIT:
            faults.append(f"projection_prng_key: expected a whole number in 0 ... 2**64 - 1, got {key!r}")
        return faults


@final
class _XsShared(Shared):
    """The holder of the random factors; those of the weights while an adapter is being loaded."""

    def __init__(self, projections: Projections, made: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.projections, self.made = projections, dict(made)


@final
class LoraXs(Method[LoraXsConfig]):
    """Parameters per layer: loraxs_R (r, r); with start='svd' also loraxs_A (r, in), loraxs_B (out, r), frozen.

    A forward first multiplies R into the shorter of A and B, r r min(in, out) products, and then costs what LoRA does.
    """

    name: ClassVar[str] = "loraxs"
    config_cls: ClassVar[type[AdapterConfig]] = LoraXsConfig
    makes: type[Delta] = LowRank
    usual_rate: ClassVar[Rate] = Rate(2e-2)
    example: ClassVar[Mapping[str, Any]] = {"r": 2}
    keys: Mapping[str, str] = {name: name for name in (CORE, FIRST, SECOND)}
    roles: Mapping[str, Role] = {FIRST: Role.FIRST, SECOND: Role.SECOND}

    def __init__(self, config: LoraXsConfig, checksum: str | None = None) -> None:
        super().__init__(config)
        self.expected_checksum = checksum

    @property
    def frozen(self) -> frozenset[str]:
        return frozenset({FIRST, SECOND} if self.config.start == "svd" else ())

    @property
    def rebuilt(self) -> frozenset[str]:
        return frozenset() if self.config.save_factors else self.frozen

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        rank = self.config.r
        if self.config.start == "random":
            extent = Extent(rank, max(site.inn for site in sites), max(site.out for site in sites))
            projections.require(adapter, {self._source(): extent})
            for site in sites:  # now: a compiled forward cannot draw them
                projections.pair(self._source(), site.device(), site.dtype())
            return _XsShared(projections, {})
        faults = [f"{site.name!r}: ({site.out}, {site.inn})" for site in sites if rank > min(site.out, site.inn)]
        if faults:
            raise ConfigError(
                gather(f"r = {rank} is more than the SVD of these layers has; lower r, or use start='random':", faults)
            )
        made = {}
        if self.expected_checksum is not None and self.rebuilt and sites[0].device().type != "meta":
            made = {site.name: self._factors(site) for site in sites}
        return _XsShared(projections, made)

    def _source(self) -> PortableSource:
        return PortableSource(self.config.projection_prng_key)

    def _factors(self, site: Site) -> tuple[Tensor, Tensor]:
        config, weight = self.config, site.whole().detach()
        if not bool(torch.isfinite(weight).all()) or not bool(weight.any()):
            what = "is all zeros" if bool(torch.isfinite(weight).all()) else "holds values that are not finite"
            raise ConfigError(f"{site.name!r}: the weight {what}, so its SVD gives no factors; use start='random'")
        return frozen_factors(weight, config.r, config.svd_iterations, config.projection_prng_key)

    def verify(self, shared: Shared) -> None:
        assert isinstance(shared, _XsShared)
        if self.expected_checksum is None or not self.rebuilt:
            return
        if not shared.made:
            raise CheckpointError("loraxs: the file holds no factors, and a base on the meta device has none to make")
        if (actual := _checksum(shared.made)) != self.expected_checksum:
            raise CheckpointError(
                f"loraxs: the factors made from this base are not those of the training (expected SHA-256 "
                f"{self.expected_checksum}, got {actual}): other weights, another dtype or quantisation of them, or "
                "another SVD. Load the adapter where it was trained, and save it with save_factors=True"
            )

    def count(self, sites: Sequence[Site]) -> int:
        return self.config.r**2 * len(sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        assert isinstance(shared, _XsShared)
        rank, device = self.config.r, site.device()
        core = torch.empty(rank, rank, device=device, dtype=torch.float32).normal_(std=SPREAD)
        if self.config.start == "random":
            return {CORE: core}
        if device.type == "meta":
            a = torch.empty(rank, site.inn, device=device, dtype=torch.float32)
            b = torch.empty(site.out, rank, device=device, dtype=torch.float32)
        else:
            a, b = shared.made.pop(site.name) if site.name in shared.made else self._factors(site)
        return {CORE: core, FIRST: a.to(device), SECOND: b.to(device)}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _XsShared)
        config, dtype, core = self.config, site.dtype(), params[CORE]
        scale = config.lora_alpha / config.r
        if config.start == "random":
            pair = shared.projections.pair(self._source(), site.device(), dtype)
            a, b = pair.a[: config.r, : site.inn], pair.b[: config.r, : site.out].T
            scale *= self._source().gain(config.r, site.fan_in) * 2.0**pair.exponent
        else:
            a, b = params[FIRST], params[SECOND]
        if site.inn < site.out:  # in the width of R, rounded once: a 16-bit base runs no float32 products of its input
            a = core @ a.to(core.dtype)  # (r, in)
        else:
            b = b.to(core.dtype) @ core  # (out, r)
        return LowRank(a=a.to(dtype), b=b.to(dtype), scale=scale)

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def from_file(cls, config: LoraXsConfig, extra: Mapping[str, Tensor], checksum: str | None) -> LoraXs:
        if extra:
            raise CheckpointError(f"loraxs: tensors that belong to no layer: {sorted(extra)}")
        if config.start == "svd" and not config.save_factors and checksum is None:
            raise CheckpointError(
                "loraxs: the file holds neither the factors (save_factors=False) nor their checksum, so it cannot be "
                "told whether this base gives them back"
            )
        return cls(config, checksum)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        tensors = super().export(sites, params, shared).tensors
        checksum = None
        if self.config.start == "svd":
            checksum = _checksum({name: (own[FIRST], own[SECOND]) for name, own in params.items()})
        return Export(tensors, checksum=checksum)


def _checksum(factors: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    """SHA-256 over the layers' names and the float32 bytes of their factors, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(factors):
        for tensor in factors[name]:
            digest.update(f"{name} {tuple(tensor.shape)};".encode())
            digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy(), dtype="<f4").tobytes())
    return digest.hexdigest()


def frozen_factors(weight: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) = V_r^T and B (out, rank) = U_r S_r of W = U S V^T; float32 on the CPU.

    Computed in float64 on the CPU. Of each pair of singular vectors the largest entry of the right one is positive,
    and the entries keep 12 binary digits: so the bits do not depend on the last digits of a machine's arithmetic
    (but for singular values that are equal, or entries on the edge between two, in about one of 10^9).

    Args:
        weight: (out, in).
        rank: at most min(out, in).
        iterations: power iterations of the randomised SVD (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4),
            started from rows of the portable matrix U_A; 0: the exact SVD.
        seed: of those rows.

    """
    matrix = weight.detach().to("cpu", torch.float64)
    out, inn = matrix.shape
    if iterations == 0 or rank + OVERSAMPLING >= min(out, inn) // 2:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        start = unit_rows(seed, MATRIX_A, rank + OVERSAMPLING, inn)
        basis = torch.linalg.qr(matrix @ torch.from_numpy(start).double().T).Q  # (out, rank + 10)
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        small, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ small
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    largest = vh.gather(1, vh.abs().argmax(1, keepdim=True)).sign()  # (rank, 1)
    return _rounded(vh * largest), _rounded(u * s * largest.T)


def _rounded(values: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2.0**DIGITS).round() * 2.0**-DIGITS, exponent).float().contiguous()
