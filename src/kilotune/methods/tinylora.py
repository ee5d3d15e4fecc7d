"""TinyLoRA (2026, arXiv 2602.04118): LoRA-XS whose r x r core is made of u numbers, W + B (sum_i v_i P_i) A.

::

    v (u,) ──P (u, r, r), frozen, random──► R (r, r)      A = S^(1/2) V^T (r, in), B = U S^(1/2) (out, r): frozen
                                                          factors of the layer's own weight U S V^T (_svd.py)

Each layer has a v of its own, or layers that follow one another share one (``weight_tying``), up to all of a model;
they are the rows of one parameter.
S is in equal parts in A and B, and P is normal with variance 1 / r, as in PEFT. v starts at zero, at the base.

P of the site i is of the stream of Gaussians of projections/streams.py: entry n of its u r r is number n of the seed's
and the site's, times 1 / sqrt(r), which goes into the scale. So the tables of all adapters of a seed nest in one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault
from ..deltas import Delta, LowRank, Role
from ..errors import CheckpointError, ConfigError, did_you_mean, gather
from ..kernels.lowrank import accumulate_dtype
from ..projections.matrices import SEED_LIMIT, Extent, Pair, Projections, Source, StoredSource, pair_checksum
from ..projections.streams import gaussians
from . import _svd
from ._base import Export, Kept, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["TinyLora", "TinyLoraConfig"]

GENERATORS = ("portable", "peft", "stored")
VECTOR, FIRST, SECOND, TABLE = "tinylora_v", "tinylora_A", "tinylora_B", "tinylora_P"
OF_PEFT = re.compile(rf"{VECTOR}\.(0|[1-9]\d{{0,8}})")  # a group's vector in PEFT's files
SVD_SEED = 0  # one for all, so that adapters of other seeds share the factors


@final
@dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(LowRankConfig):
    """TinyLoRA's options, under PEFT's names; ``generator``, ``save_factors`` and ``svd_iterations`` are ours."""

    peft_type: ClassVar[str] = "TINYLORA"
    bias_modes: ClassVar[Names] = ("none", "all", "tinylora_only")

    r: int = option(2, "The rank of the frozen factors; a smaller layer has its own. The paper's is 2.")
    u: int = option(64, "How many numbers a vector has; 1 to 13 do in the paper.")
    weight_tying: float = option(
        0.0,
        "How many layers share a vector, in [0, 1]: 0, each has its own; 1, all have one; between, "
        "n (1 - weight_tying) groups of layers that follow one another.",
    )
    projection_seed: int = option(42, "The seed of the tables P, 0 ... 2**64 - 1.")
    save_projection: bool = option(
        False,
        "Write the tables P into the file, u r r numbers a layer. PEFT's default is True, because its tables depend on "
        "torch's generator; the portable ones come back from the seed on any machine.",
    )
    init_v_bound: float = option(0.02, "With init_weights='uniform' the vectors start uniform in +- this.")
    tinylora_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1).")
    init_weights: bool | str = option(True, "True: the vectors start at zero. 'uniform': at random, see init_v_bound.")
    generator: str = option(
        "portable",
        "Where P comes from: 'portable' (the same bits everywhere), 'peft' (what PEFT draws for this seed, these "
        "targets and their order). 'stored' stands in adapters that brought theirs along.",
        ours=True,
    )
    save_factors: bool = option(
        False,
        "Write the frozen factors into the file, r (in + out) numbers a layer, so that it loads on the base in any "
        "dtype or quantisation, and, with save_projection or generator='peft', in PEFT. False: a fingerprint; they are "
        "made again from the base, and loading is refused where they come out otherwise.",
        ours=True,
    )
    svd_iterations: int = option(
        10,
        "Power iterations of the randomised SVD. 0: the exact SVD, which takes far longer for large layers; small ones "
        "get it anyway.",
        ours=True,
    )

    @property
    def dropout(self) -> float:
        return self.tinylora_dropout

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> TinyLoraConfig:
        """PEFT's files have the factors, and mean PEFT's tables: those in the file, or those that its generator draws.

        Ours say so otherwise, by ``generator``. How PEFT's vectors started does not matter any more.
        """
        if "generator" not in section:
            generator = "stored" if values.get("save_projection", True) else "peft"
            section = {**section, "generator": generator, "save_factors": True}
            if values.get("init_weights") is False:
                values = {**values, "init_weights": True}
        return cls.from_dict({**values, **section})

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("u", self.u, low=1, whole=True)
        faults += number_fault("weight_tying", self.weight_tying, low=0, high=1)
        faults += number_fault("init_v_bound", self.init_v_bound, low=0)
        faults += rate_fault("tinylora_dropout", self.tinylora_dropout)
        faults += number_fault("svd_iterations", self.svd_iterations, low=0, high=1000, whole=True)
        faults += bool_faults(self, "save_projection", "save_factors")
        if self.init_weights is not True and self.init_weights != "uniform":
            faults.append(f"init_weights: expected True or 'uniform', got {self.init_weights!r}")
        if type(self.projection_seed) is not int or not 0 <= self.projection_seed < SEED_LIMIT:
            faults.append(f"projection_seed: expected a whole number in 0 ... 2**64 - 1, got {self.projection_seed!r}")
        if self.generator not in GENERATORS:
            meant = did_you_mean(str(self.generator), GENERATORS)
            faults.append(f"generator: expected one of {list(GENERATORS)}, got {self.generator!r}.{meant}")
        if self.save_factors is False:
            why = "needs save_factors=True, for PEFT reads no file without the factors"
            faults += [f"generator={self.generator!r}: {why}"] if self.generator != "portable" else []
            faults += [f"save_projection: {why}"] if self.save_projection is True else []
        return faults


@final
@dataclass(frozen=True)
class _Drawn(Source):
    """The tables of one site: ``a`` (u, r r), ``b`` empty. Portable ones nest in u, so adapters of one seed share them.

    u: of PEFT's, which are drawn all at once; 0 for portable ones. gained: portable ones with the gain in them, rounded
    to float32, as a file has them that PEFT is to read.
    """

    seed: int
    site: int
    rank: int
    u: int = 0
    gained: bool = False

    def build(self, extent: Extent) -> Pair:
        size = self.rank * self.rank
        if self.u:  # a generator of its own for each layer, on the CPU whatever the default device is
            generator = torch.Generator(device="cpu").manual_seed((self.seed + self.site) % SEED_LIMIT)
            table = torch.empty(self.u, self.rank, self.rank, dtype=torch.float32, device="cpu")
            table.normal_(0.0, 1.0 / self.rank**0.5, generator=generator)
        else:
            table = torch.from_numpy(gaussians(self.seed, self.site, 0, extent.rank * size))
            table = (table.double() / math.sqrt(self.rank)).float() if self.gained else table
        return Pair(table.reshape(-1, size), torch.zeros(extent.rank, 0, device="cpu"))

    def gain(self, rank: int, inn: int) -> float:
        return 1.0 if self.u or self.gained else 1.0 / math.sqrt(self.rank)


@final
class _TinyShared(Shared):
    """The holder; by site its factors, its tables, and which vector it takes."""

    def __init__(
        self,
        projections: Projections,
        sources: Mapping[str, Source],
        tables: Mapping[str, Source],
        groups: Mapping[str, int],
    ) -> None:
        super().__init__(common=(*sources.values(), *tables.values()))
        self.projections, self.sources, self.tables = projections, dict(sources), dict(tables)
        self.groups = dict(groups)


@final
class TinyLora(Method[TinyLoraConfig]):
    """Parameters of the whole model: tinylora_v (groups, u), a row for each layer or for each group that shares one.

    A file may have tinylora_A (r, in), tinylora_B (out, r) and tinylora_P (u, r, r) of each layer, frozen, as well.
    """

    name: ClassVar[str] = "tinylora"
    config_cls: ClassVar[type[AdapterConfig]] = TinyLoraConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(2e-2)
    example: ClassVar[Mapping[str, Any]] = {"u": 5, "svd_iterations": 0, "save_factors": True}
    keys: Mapping[str, str] = {name: name for name in (FIRST, SECOND, TABLE)}
    roles: Mapping[str, Role] = {FIRST: Role.FIRST, SECOND: Role.SECOND}
    default_targets: Mapping[str, Sequence[str]] = {"phi": ("q_proj", "v_proj", "fc1", "fc2")}

    def __init__(self, config: TinyLoraConfig, vectors: Tensor | None = None, checksum: str | None = None) -> None:
        super().__init__(config)
        self.vectors, self.expected_checksum = vectors, checksum

    @property
    def carried(self) -> frozenset[str]:
        factors = {FIRST, SECOND} if self.config.save_factors else set()
        return frozenset(factors | ({TABLE} if self.config.generator == "stored" else set()))

    def carries(self, site: Site) -> dict[str, tuple[int, ...]]:
        rank = self._rank(site)
        return {FIRST: (rank, site.inn), SECOND: (site.out, rank), TABLE: (self.config.u, rank, rank)}

    def _rank(self, site: Site) -> int:
        return min(self.config.r, site.out, site.inn)

    # -- once for an adapter ---------------------------------------------------------------------------

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        config = self.config

        def like(site: Site) -> _svd.WeightSource:
            return _svd.WeightSource(self._rank(site), config.svd_iterations, SVD_SEED, _svd.Split.EVEN)

        sources = _svd.claim(sites, like, projections, (FIRST, SECOND), "leave the layer out")
        if not config.save_factors and self.expected_checksum is None:
            _svd.check_ties(sources, "use save_factors=True, which keeps them in the file, or a smaller r")
        tables = {site.name: self._table(site, index) for index, site in enumerate(sites)}
        needs = _svd.extents(sites, sources, self._rank)
        needs.update({tables[site.name]: Extent(config.u, self._rank(site) ** 2, 0) for site in sites})
        projections.require(adapter, needs)
        for site in sites:  # now: a compiled forward cannot make them
            for source in (sources[site.name], tables[site.name]):
                projections.pair(source, site.device(), accumulate_dtype(site.dtype()))
        return _TinyShared(projections, sources, tables, _groups(sites, config.weight_tying))

    def _table(self, site: Site, index: int) -> Source:
        config, rank = self.config, self._rank(site)
        if config.generator == "peft":
            return _Drawn(config.projection_seed, index, rank, config.u)
        if config.generator == "portable":
            return _Drawn(config.projection_seed, index, rank, gained=config.save_projection)
        if TABLE in site.brought:
            table = site.brought[TABLE].reshape(config.u, rank * rank)
            return StoredSource.of(table, torch.zeros(0, config.u, device="cpu"))
        if site.device().type == "meta":
            return _Drawn(config.projection_seed, index, rank)  # of the same size
        raise ConfigError("generator='stored' is for adapters loaded from a file; use 'portable' or 'peft'")

    def init_model(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        config, device = self.config, sites[0].device()
        count, given = self._vectors_of(sites), self.vectors
        if given is None:  # on the CPU, so that a seed gives one start; a plan has no numbers
            vectors = torch.zeros(
                count, config.u, dtype=torch.float32, device="meta" if device.type == "meta" else "cpu"
            )
            if config.init_weights == "uniform":
                nn.init.uniform_(vectors, -config.init_v_bound, config.init_v_bound)
            return {VECTOR: vectors.to(device)}
        if given.shape[0] != count:
            raise CheckpointError(
                f"tinylora: the file has {given.shape[0]} vectors, and the layers of this model have {count}: other "
                "layers are adapted than those that it was trained on"
            )
        return {VECTOR: given.to(device, accumulate_dtype(given.dtype), copy=True)}

    def verify(self, shared: Shared) -> None:
        assert isinstance(shared, _TinyShared)
        expected = self.expected_checksum
        if expected is None or self.config.generator == "stored":
            return
        if self.config.generator == "peft":
            if (actual := _tables_checksum(shared)) != expected:
                raise CheckpointError(
                    f"tinylora: the tables do not match the checkpoint: expected SHA-256 {expected}, got {actual}; the "
                    "seed, the layers' order or torch's generator differ from those at training"
                )
        elif not self.config.save_factors:
            _svd.check_known_again(self.name, expected, shared.sources)

    def check_brought(self, shared: Shared, brought: Mapping[str, Mapping[str, Tensor]]) -> None:
        assert isinstance(shared, _TinyShared)
        for name, own in brought.items():
            if FIRST in own:
                _svd.check_close(own[FIRST], own[SECOND], _svd.pair_of(shared.sources[name]), name)
            if TABLE in own:
                table, source = own[TABLE].flatten(1), shared.tables[name]
                mine = source.build(Extent(table.shape[0], table.shape[1], 0)).a[: len(table)] * source.gain(0, 0)
                if not torch.allclose(mine, table.cpu().float(), rtol=1e-6, atol=1e-6):
                    raise CheckpointError(f"its tables of {name!r} are not those of the seed here")

    # -- a layer -----------------------------------------------------------------------------------------

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        return {}

    def _vectors_of(self, sites: Sequence[Site]) -> int:
        return len(set(_groups(sites, self.config.weight_tying).values()))

    def count(self, sites: Sequence[Site]) -> int:
        return self.config.u * self._vectors_of(sites)

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _TinyShared)
        device, dtype, rank = site.device(), site.dtype(), self._rank(site)
        vector = shared.trained[VECTOR][..., shared.groups[site.name], :].to(device)  # (..., u)
        wide, table = accumulate_dtype(dtype), shared.tables[site.name]
        pair = shared.projections.pair(shared.sources[site.name], device, wide)
        tables = shared.projections.pair(table, device, wide).a[: self.config.u]  # (u, r r)
        core = (vector @ tables.to(vector.dtype)).unflatten(-1, (rank, rank))  # (..., r, r), of each adapter in front
        a, b = pair.a, pair.b.T
        if site.inn < site.out:  # in the width of the vector, rounded once
            a = core @ a.to(core.dtype)  # (..., r, in)
        else:
            b = b.to(core.dtype) @ core  # (..., out, r)
        return LowRank(a=a.to(dtype), b=b.to(dtype), scale=table.gain(rank, site.fan_in))

    # -- files -------------------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        if key in (FIRST, SECOND, TABLE):
            return Kept.BROUGHT
        return Kept.TRAINED if key == VECTOR or OF_PEFT.fullmatch(key) else None

    @classmethod
    def from_file(cls, config: TinyLoraConfig, extra: Mapping[str, Tensor], checksum: str | None) -> TinyLora:
        made = cls(config, checksum=checksum)
        wide = {key: value for key, value in extra.items() if key == VECTOR or OF_PEFT.fullmatch(key)}
        own = set(wide) | {key for key in extra if key.rpartition(".")[2] in made.carried}
        faults = [f"unexpected: {key}" for key in sorted(extra) if key not in own]
        if not config.save_factors and checksum is None:
            faults.append("neither the frozen factors (save_factors=False) nor their fingerprint")
        if not faults:
            made.vectors = _vectors(wide, config, faults)
        if faults:
            raise CheckpointError(gather("tinylora: the file is not what its config says:", faults))
        return made

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        assert isinstance(shared, _TinyShared)
        config, plain = self.config, super().export(sites, params, shared)
        tensors, own = dict(plain.tensors), [sites[name] for name in params]
        if config.save_factors:
            tensors.update(_svd.in_file(own, shared.sources, FIRST, SECOND))
        if stored := config.save_projection or config.generator == "stored":
            tensors.update({f"{site.name}.{TABLE}": self._table_in_file(site, shared) for site in own})
        section = {"generator": "stored" if stored else config.generator}
        if not config.save_factors:
            checksum, fingerprint = _svd.to_be_known(self.expected_checksum, shared.sources)
            return Export(tensors, section=section, checksum=checksum, fingerprint=fingerprint)
        turned = any(
            site.fan_in < site.inn for site in own
        )  # an embedding, whose matrix PEFT takes the other way round
        if turned or not (stored or config.generator == "peft"):
            return Export(tensors, section=section)
        checksum = None if stored else _tables_checksum(shared)
        return Export(_of_peft(tensors), peft=True, config={"save_projection": stored}, checksum=checksum)

    def _table_in_file(self, site: Site, shared: _TinyShared) -> Tensor:
        rank, source = self._rank(site), shared.tables[site.name]
        shape = (self.config.u, rank, rank)
        pair = source.pair if isinstance(source, StoredSource) else source.build(Extent(self.config.u, rank * rank, 0))
        return (pair.a.double() * source.gain(rank, 0)).float().reshape(shape)


def _groups(sites: Sequence[Site], tying: float) -> dict[str, int]:
    """Which vector each layer takes, as PEFT deals them out."""
    count = max(1, round(len(sites) * (1.0 - tying)))
    size = max(1, len(sites) // count)
    return {site.name: min(index // size, count - 1) for index, site in enumerate(sites)}


def _vectors(given: Mapping[str, Tensor], config: TinyLoraConfig, faults: list[str]) -> Tensor | None:
    """The vectors that a file has, (groups, u), from ours or PEFT's; None where it has none, which is a fault."""
    if VECTOR in given and len(given) == 1:
        whole = given[VECTOR]
    elif given and VECTOR not in given:
        ordered = [given.get(f"{VECTOR}.{index}") for index in range(len(given))]
        there = [vector for vector in ordered if vector is not None and vector.shape == (config.u,)]
        if len(there) < len(given):
            faults.append(f"{VECTOR}: expected vectors 0 ... {len(given) - 1} of {config.u} numbers each")
            return None
        whole = torch.stack(there)
    elif given:
        faults.append(f"both {VECTOR} and vectors of groups")
        return None
    else:
        faults.append(f"missing: {VECTOR} (groups, {config.u})")
        return None
    if whole.ndim != 2 or whole.shape[1] != config.u:
        faults.append(f"shape of {VECTOR}: expected (groups, {config.u}), got {tuple(whole.shape)}")
    return whole


def _of_peft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the vectors as PEFT has them, a tensor for each group."""
    named = {key: value for key, value in tensors.items() if key != VECTOR}
    return {**named, **{f"{VECTOR}.{i}": vector for i, vector in enumerate(tensors[VECTOR])}}


def _tables_checksum(shared: _TinyShared) -> str:
    """SHA-256 of all tables in order."""
    return pair_checksum(source.build(Extent(0, 0, 0)) for source in shared.tables.values())
