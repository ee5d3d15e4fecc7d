"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2): W + diag(b) B diag(d) A.

A and B are frozen random projections, shared by all layers; per layer only d (r,) and b (out,) are trained.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault
from ..deltas import Delta, LowRank
from ..errors import CheckpointError, ConfigError
from ..projections.matrices import (
    SEED_LIMIT,
    Extent,
    Pair,
    PeftSource,
    PortableSource,
    Projections,
    Source,
    StoredSource,
    pair_checksum,
)
from ._base import Export, Kept, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["Vera", "VeraConfig"]

GENERATORS = ("portable", "peft", "stored")
SHARINGS = ("nested", "shape")
KEY_A, KEY_B = "vera_A", "vera_B"


@final
@dataclass(frozen=True, kw_only=True)
class VeraConfig(LowRankConfig):
    """VeRA's options, under PEFT's names, and two of ours: ``generator`` and ``sharing``."""

    peft_type: ClassVar[str] = "VERA"
    bias_modes: ClassVar[Names] = ("none", "all", "vera_only")

    r: int = option(256, "The rank. VeRA takes much larger ones than LoRA, because a rank costs one number a layer.")
    projection_prng_key: int = option(0, "The seed of the frozen matrices, 0 ... 2**64 - 1.")
    save_projection: bool = option(
        False,
        "Write the frozen matrices into the checkpoint, so that PEFT can load it. PEFT's default is True, because "
        "its matrices depend on torch's generator; the portable ones come back from the seed on any machine.",
    )
    vera_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1); none at an embedding, as in PEFT.")
    d_initial: float = option(0.1, "The start value of d; b starts at zero. Small values are best (paper, Table 6).")
    init_weights: bool = option(True, "False: b starts at ones and d normally distributed, for experiments.")
    generator: str = option(
        "portable",
        "Where the matrices come from: 'portable' (the same bits everywhere), 'peft' (those that PEFT draws for "
        "this seed and these targets). 'stored' stands in adapters that brought their matrices along.",
        ours=True,
    )
    sharing: str = option(
        "nested",
        "'nested': one pair for all layers, of which each takes a corner. 'shape': a pair for each layer shape.",
        ours=True,
    )

    @property
    def dropout(self) -> float:
        return self.vera_dropout

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> VeraConfig:
        """PEFT's files mean PEFT's matrices: those in the file, or those that its generator draws.

        Ours say so otherwise: by ``generator``, older ones by ``save_projection`` in our section.
        """
        if not section.keys() & {"generator", "save_projection"}:
            section = {**section, "generator": "stored" if values.get("save_projection", True) else "peft"}
        return cls.from_dict({**values, **section})

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("d_initial", self.d_initial, low=-math.inf)
        faults += rate_fault("vera_dropout", self.vera_dropout)
        faults += bool_faults(self, "save_projection", "init_weights")
        key = self.projection_prng_key
        if type(key) is not int or not 0 <= key < SEED_LIMIT:
            faults.append(f"projection_prng_key: expected a whole number in 0 ... 2**64 - 1, got {key!r}")
        for name, valid in (("generator", GENERATORS), ("sharing", SHARINGS)):
            if getattr(self, name) not in valid:
                faults.append(f"{name}: expected one of {list(valid)}, got {getattr(self, name)!r}")
        if self.sharing == "shape" and self.generator != "portable":
            faults.append(f"sharing='shape' needs generator='portable', got {self.generator!r}")
        return faults


@final
class _VeraShared(Shared):
    """The holder of the matrices, and which pair each layer shape uses."""

    def __init__(self, projections: Projections, needs: dict[Source, Extent], by_shape: dict[tuple[int, int], Source]):
        super().__init__()
        self.projections, self.needs, self.by_shape = projections, needs, by_shape

    def source(self, site: Site) -> Source:
        return self.by_shape[(site.out, site.inn)]

    def definition(self, source: Source) -> Pair:
        """The float32 matrices as they are defined, cut to what this adapter alone needs."""
        extent = self.needs[source]
        a, b, _ = source.build(extent)
        return Pair(a[: extent.rank, : extent.inn], b[: extent.rank, : extent.out])

    def checksum(self) -> str:
        """Of the matrices as defined; worked out once, for they never change."""
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        ordered = sorted(self.needs, key=lambda source: self.needs[source])
        return pair_checksum(self.definition(source) for source in ordered)


@final
class Vera(Method[VeraConfig]):
    """Parameters per layer: vera_lambda_d (r,) and vera_lambda_b (out,)."""

    name: ClassVar[str] = "vera"
    config_cls: ClassVar[type[AdapterConfig]] = VeraConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(8e-2)
    example: ClassVar[Mapping[str, Any]] = {"r": 4}
    keys: Mapping[str, str] = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}

    def __init__(self, config: VeraConfig, stored: StoredSource | None = None, checksum: str | None = None) -> None:
        super().__init__(config)
        self.stored, self.expected_checksum = stored, checksum

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        by_shape = {(site.out, site.inn): self._source(site, sites) for site in sites}
        needs: dict[Source, Extent] = {}
        for (out, inn), source in by_shape.items():
            extent = Extent(self.config.r, inn, out)
            needs[source] = needs[source].union(extent) if source in needs else extent
        shared = _VeraShared(projections, needs, by_shape)
        projections.require(adapter, needs)
        for site in sites:
            projections.pair(shared.source(site), site.device(), site.dtype())
        return shared

    def verify(self, shared: Shared) -> None:
        assert isinstance(shared, _VeraShared)
        if self.stored is not None:
            self.stored.build(shared.needs[self.stored])
        if self.expected_checksum is None or (actual := shared.checksum()) == self.expected_checksum:
            return
        raise CheckpointError(
            f"the projections do not match the checkpoint: expected SHA-256 {self.expected_checksum}, got {actual}; "
            "the seed, the targets or the base model's shapes differ from those at training"
        )

    def _source(self, site: Site, sites: Sequence[Site]) -> Source:
        seed = self.config.projection_prng_key
        largest = Extent(self.config.r, max(s.inn for s in sites), max(s.out for s in sites))
        if self.config.generator == "stored":
            if self.stored is None:
                raise ConfigError("generator='stored' is for adapters loaded from a file; use 'portable' or 'peft'")
            return self.stored
        if self.config.generator == "peft":
            return PeftSource(seed, largest)
        return PortableSource(seed, (site.out, site.inn) if self.config.sharing == "shape" else None)

    def count(self, sites: Sequence[Site]) -> int:
        return sum(self.config.r + site.out for site in sites)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        b = torch.zeros(site.out, device=site.device(), dtype=torch.float32)
        d = torch.full([self.config.r], float(self.config.d_initial), device=site.device(), dtype=torch.float32)
        if not self.config.init_weights:
            b.fill_(1.0)
            d.normal_()
        return {"vera_lambda_b": b, "vera_lambda_d": d}

    def first_factor(self, site: Site, shared: Shared) -> Hashable:
        assert isinstance(shared, _VeraShared)
        return shared.source(site), self.config.r, site.inn

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _VeraShared)
        source, rank = shared.source(site), self.config.r
        a, b, exponent = shared.projections.pair(source, site.device(), site.dtype())
        return LowRank(
            a=a[:rank, : site.inn],
            b=b[:rank, : site.out].T,
            mid=params["vera_lambda_d"],
            out=params["vera_lambda_b"],
            scale=source.gain(rank, site.fan_in) * 2.0**exponent,
        )

    # -- files -----------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        return Kept.BROUGHT if key in (KEY_A, KEY_B) else super().kept(key)

    @classmethod
    def from_file(cls, config: VeraConfig, extra: Mapping[str, Tensor], checksum: str | None) -> Vera:
        unknown = sorted(set(extra) - {KEY_A, KEY_B})
        if unknown:
            raise CheckpointError(f"vera: tensors that belong to no layer: {unknown}")
        if config.generator != "stored":
            if extra:
                raise CheckpointError(
                    f"vera: the file holds {sorted(extra)}, but its config says save_projection=False; which matrices "
                    "the adapter was trained with cannot be told. Set save_projection to true there if it was these"
                )
            return cls(config, checksum=checksum)
        if set(extra) != {KEY_A, KEY_B}:
            raise CheckpointError(
                f"vera: the config says that the projections are saved, but the file holds {sorted(extra) or 'none'} "
                f"of {[KEY_A, KEY_B]}"
            )
        a, b = extra[KEY_A], extra[KEY_B]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != config.r:
            raise CheckpointError(
                f"vera: expected vera_A ({config.r}, in) and vera_B (out, {config.r}), got {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            )
        return cls(config, stored=StoredSource.of(a, b), checksum=None)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        assert isinstance(shared, _VeraShared)
        plain = super().export(sites, params, shared)
        generator = self.config.generator
        if not self.config.save_projection and generator != "stored":
            same = generator == "peft"  # it would draw others than the portable ones for the seed
            section = {"generator": generator}
            return Export(plain.tensors, peft=same, section=section, checksum=shared.checksum())
        if generator == "portable":
            return _with_portable_projections(self, sites, params, shared)
        pair = shared.definition(next(iter(shared.needs)))
        if isinstance(self.stored, StoredSource):
            pair = self.stored.pair
        tensors, section = {**plain.tensors, **_projection_tensors(pair)}, {"generator": "stored"}
        return Export(tensors, peft=True, config={"save_projection": True}, section=section)


def _projection_tensors(pair: Pair) -> dict[str, Tensor]:
    return {KEY_A: pair.a.contiguous(), KEY_B: pair.b.T.contiguous()}


def _with_portable_projections(
    method: Vera, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: _VeraShared
) -> Export:
    """PEFT's form of the portable matrices: one A and B of the largest shape, no gain per layer.

    A carries the gain of the largest in_features, so each layer's d is multiplied by sqrt(max_in / in).
    Pairs per shape are stacked along the rank, and each layer's d is zero outside its own pair's block.
    """
    rank, sources = method.config.r, list(shared.needs)
    max_in = max(extent.inn for extent in shared.needs.values())
    max_out = max(extent.out for extent in shared.needs.values())
    a = torch.zeros(rank * len(sources), max_in, device="cpu")
    b = torch.zeros(rank * len(sources), max_out, device="cpu")
    gain_a, gain_b = math.sqrt(6.0 / max_in), math.sqrt(6.0 / rank)
    for i, source in enumerate(sources):
        unit = shared.definition(source)
        rows = slice(i * rank, (i + 1) * rank)
        a[rows, : unit.a.shape[1]] = (unit.a.double() * gain_a).float()
        b[rows, : unit.b.shape[1]] = (unit.b.double() * gain_b).float()
    tensors: dict[str, Tensor] = {}
    for module, own in params.items():
        site, d = sites[module], own["vera_lambda_d"].detach()
        block = sources.index(shared.source(site)) * rank
        stacked = torch.zeros(rank * len(sources), dtype=d.dtype, device="cpu")
        stacked[block : block + rank] = (d.cpu().double() * math.sqrt(max_in / site.fan_in)).to(d.dtype)
        tensors[f"{module}.vera_lambda_d"] = stacked
        tensors[f"{module}.vera_lambda_b"] = own["vera_lambda_b"]
    config = {"save_projection": True, "r": rank * len(sources)}
    section = {"generator": "stored", "sharing": "nested"}
    return Export({**tensors, **_projection_tensors(Pair(a, b))}, peft=True, config=config, section=section)
