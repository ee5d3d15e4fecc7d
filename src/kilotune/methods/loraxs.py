"""LoRA-XS (Balazy et al. 2024, arXiv 2405.17604): W + (alpha / r) B R A, and only R (r, r) is trained.

A (r, in) and B (out, r) are frozen: A the top r right singular vectors of the layer's own weight, B the left ones
times the singular values (the paper), or random matrices from a seed, which all layers share (``start="random"``).
Either way they are held once for all the adapters of a model (_svd.py), and an adapter has R alone.
R starts normal with deviation 1e-5, as in the paper's code, so that it gets a gradient wherever B and A do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault
from ..deltas import Delta, LowRank, Role
from ..errors import CheckpointError, did_you_mean
from ..kernels.lowrank import accumulate_dtype
from ..projections.matrices import SEED_LIMIT, Extent, PortableSource, Projections, Source
from . import _svd
from ._base import Export, Kept, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["LoraXs", "LoraXsConfig"]

STARTS = ("svd", "random")
SPREAD = 1e-5  # of R at its start
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
    """The holder of the factors, and by site which they are."""

    def __init__(self, projections: Projections, sources: Mapping[str, Source]) -> None:
        super().__init__(common=tuple(sources.values()))
        self.projections, self.sources = projections, dict(sources)


@final
class LoraXs(Method[LoraXsConfig]):
    """Parameters per layer: loraxs_R (r, r). A file may have loraxs_A (r, in) and loraxs_B (out, r), frozen, as well.

    A forward first multiplies R into the shorter of A and B, r r min(in, out) products, and then costs what LoRA does.
    """

    name: ClassVar[str] = "loraxs"
    config_cls: ClassVar[type[AdapterConfig]] = LoraXsConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(2e-2)
    example: ClassVar[Mapping[str, Any]] = {"r": 2}
    keys: Mapping[str, str] = {name: name for name in (CORE, FIRST, SECOND)}
    roles: Mapping[str, Role] = {FIRST: Role.FIRST, SECOND: Role.SECOND}

    def __init__(self, config: LoraXsConfig, checksum: str | None = None) -> None:
        super().__init__(config)
        self.expected_checksum = checksum

    @property
    def carried(self) -> frozenset[str]:
        config = self.config
        return frozenset({FIRST, SECOND} if config.start == "svd" and config.save_factors else ())

    def carries(self, site: Site) -> dict[str, tuple[int, ...]]:
        rank = self.config.r
        return {FIRST: (rank, site.inn), SECOND: (site.out, rank)}

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        config = self.config
        if config.start == "random":
            extent = Extent(config.r, max(site.inn for site in sites), max(site.out for site in sites))
            random = self._random
            sources: dict[str, Source] = {site.name: random for site in sites}
            projections.require(adapter, {random: extent})
        else:
            _svd.check_rank(config.r, sites, "lower r, or use start='random'")
            seed, split = config.projection_prng_key, _svd.Split.SECOND
            like = _svd.WeightSource(config.r, config.svd_iterations, seed, split)
            sources = _svd.claim(sites, lambda site: like, projections, (FIRST, SECOND), "use start='random'")
            if not config.save_factors and self.expected_checksum is None:
                _svd.check_ties(sources, "use save_factors=True, which keeps them in the file")
            projections.require(adapter, _svd.extents(sites, sources, lambda site: config.r))
        for site in sites:  # now: a compiled forward cannot make them
            projections.pair(sources[site.name], site.device(), self._held_in(site))
        return _XsShared(projections, sources)

    @property
    def _random(self) -> PortableSource:
        return PortableSource(self.config.projection_prng_key)

    def _held_in(self, site: Site) -> torch.dtype:
        """Those of a weight in the width of R, so that their product is rounded once."""
        return site.dtype() if self.config.start == "random" else accumulate_dtype(site.dtype())

    def verify(self, shared: Shared) -> None:
        assert isinstance(shared, _XsShared)
        expected = self.expected_checksum
        if expected is None or self.config.start == "random" or self.config.save_factors:
            return
        _svd.check_known_again(self.name, expected, shared.sources)

    def check_brought(self, shared: Shared, brought: Mapping[str, Mapping[str, Tensor]]) -> None:
        assert isinstance(shared, _XsShared)
        for name, own in brought.items():
            if own:
                _svd.check_close(own[FIRST], own[SECOND], _svd.pair_of(shared.sources[name]), name)

    def count(self, sites: Sequence[Site]) -> int:
        return self.config.r**2 * len(sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        rank = self.config.r
        return {CORE: torch.empty(rank, rank, device=site.device(), dtype=torch.float32).normal_(std=SPREAD)}

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _XsShared)
        rank, dtype, core = self.config.r, site.dtype(), params[CORE]
        source = shared.sources[site.name]
        pair = shared.projections.pair(source, site.device(), self._held_in(site))
        a, b = pair.a[:rank, : site.inn], pair.b[:rank, : site.out].T
        scale = self.config.lora_alpha / rank * source.gain(rank, site.fan_in) * 2.0**pair.exponent
        if site.inn < site.out:  # in the width of R, rounded once: a 16-bit base runs no float32 products of its input
            a = core @ a.to(core.dtype)  # (r, in)
        else:
            b = b.to(core.dtype) @ core  # (out, r)
        return LowRank(a=a.to(dtype), b=b.to(dtype), scale=scale)

    # -- files -------------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        return Kept.BROUGHT if key in (FIRST, SECOND) else super().kept(key)

    @classmethod
    def from_file(cls, config: LoraXsConfig, extra: Mapping[str, Tensor], checksum: str | None) -> LoraXs:
        made = cls(config, checksum)
        if strange := sorted(key for key in extra if key.rpartition(".")[2] not in made.carried):
            why = "frozen factors, but its config says that it has none" if strange[0].endswith((FIRST, SECOND)) else ""
            raise CheckpointError(f"loraxs: the file holds {why or 'tensors that belong to no layer'}: {strange}")
        if config.start == "svd" and not config.save_factors and checksum is None:
            raise CheckpointError(
                "loraxs: the file holds neither the factors (save_factors=False) nor their fingerprint, so it cannot "
                "be told whether this base gives them back"
            )
        return made

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        assert isinstance(shared, _XsShared)
        plain = super().export(sites, params, shared)
        if self.config.start == "random":
            return plain
        if self.config.save_factors:
            return Export(
                {**plain.tensors, **_svd.in_file([sites[name] for name in params], shared.sources, FIRST, SECOND)}
            )
        checksum, fingerprint = _svd.to_be_known(self.expected_checksum, shared.sources)
        return Export(plain.tensors, checksum=checksum, fingerprint=fingerprint)
