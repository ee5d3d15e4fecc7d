"""RandLoRA (Albert et al. 2025, arXiv 2502.00987): W + (alpha / r) sum_j B_j diag(lambda_j) A diag(gamma_j).

::

    j = 1 ... n, the bases
    least, most = min(out, in), max(out, in);  n = ceil(least / r)
    A (r, least), one for all bases;  B_j (most, r);  lambda (r, n) and gamma (n, least) are trained
    in <= out: the change is that sum (most, least);  in > out: its transpose

A and the B_j are frozen random matrices, shared by all layers: each takes the first rows and columns of one pair. The
change has up to full rank, and it is of low rank in form: r n columns, the k-th of base j at place k n + j. So it runs
as one, whose way is picked by cost: by the factors where tokens are few, in r n (in + out) products each, and where
they are many by W + change, built in each forward. Acting base by base is as many products as the factors are, and n
inputs to keep.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from ..config import AdapterConfig, Names, bool_faults, number_fault, option, rate_fault
from ..deltas import Delta, LowRank
from ..errors import CheckpointError, ConfigError, did_you_mean
from ..kernels.lowrank import accumulate_dtype
from ..projections.matrices import SEED_LIMIT, Extent, Pair, Projections, Source, StoredSource, pair_checksum, unit_rows
from ._base import Export, Kept, LowRankConfig, Method, Rate, Shared, Site

__all__ = ["RandLora", "RandLoraConfig"]

GENERATORS = ("portable", "peft", "stored")
LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
KEY_A, KEY_B = "randlora_A", "randlora_B"
SPARSE = 3.0  # of a sparse matrix one number in so many is not zero


@final
@dataclass(frozen=True, kw_only=True)
class RandLoraConfig(LowRankConfig):
    """RandLoRA's options, under PEFT's names, and one of ours: ``generator``."""

    peft_type: ClassVar[str] = "RANDLORA"
    bias_modes: ClassVar[Names] = ("none", "all", "randlora_only")

    r: int = option(32, "The rank of a base. Smaller ones train more numbers: about least^2 / r a layer.")
    projection_prng_key: int = option(0, "The seed of the frozen matrices, 0 ... 2**64 - 1.")
    save_projection: bool = option(
        False,
        "Write the frozen matrices into the checkpoint, so that PEFT can load it; they are as large as the largest "
        "layer. PEFT's default is True, because its matrices depend on the machine; the portable ones come back from "
        "the seed.",
    )
    sparse: bool = option(False, "Frozen matrices of -1, 0 and 1: a sixth of them -1, a sixth 1.")
    very_sparse: bool = option(
        False,
        "Frozen matrices of -1, 0 and 1: of d, the smaller side of the layers, 1 / (2 sqrt(d)) of them -1, as many 1. "
        "Goes before sparse.",
    )
    randlora_dropout: float = option(0.0, "Dropout on the adapter's input, in [0, 1); none at an embedding.")
    randlora_alpha: float = option(640, "The scale is randlora_alpha / r; usually 20 r.")
    init_weights: bool = option(True, "True: lambda starts at zero, so at the base; False: normal, for experiments.")
    generator: str = option(
        "portable",
        "Where the matrices come from: 'portable' (the same bits everywhere), 'peft' (those that PEFT draws for this "
        "seed and these targets; sparse ones only, for it draws dense ones in the dtype that the machine has). "
        "'stored' stands in adapters that brought their matrices along.",
        ours=True,
    )

    @property
    def dropout(self) -> float:
        return self.randlora_dropout

    @property
    def ternary(self) -> bool:
        """Whether the frozen matrices are of -1, 0 and 1."""
        return self.sparse or self.very_sparse

    @classmethod
    def from_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> RandLoraConfig:
        """PEFT's files mean PEFT's matrices: those in the file, or those that it draws."""
        if "generator" not in section:
            section = {**section, "generator": "stored" if values.get("save_projection", True) else "peft"}
        return cls.from_dict({**values, **section})

    def faults(self) -> list[str]:
        faults = number_fault("r", self.r, low=1, whole=True)
        faults += number_fault("randlora_alpha", self.randlora_alpha, low=0)
        faults += rate_fault("randlora_dropout", self.randlora_dropout)
        faults += bool_faults(self, "save_projection", "init_weights", "sparse", "very_sparse")
        key = self.projection_prng_key
        if type(key) is not int or not 0 <= key < SEED_LIMIT:
            faults.append(f"projection_prng_key: expected a whole number in 0 ... 2**64 - 1, got {key!r}")
        if self.generator not in GENERATORS:
            hint = did_you_mean(str(self.generator), GENERATORS)
            faults.append(f"generator: expected one of {list(GENERATORS)}, got {self.generator!r}.{hint}")
        elif self.generator == "peft" and not self.ternary:
            faults.append(
                "generator='peft': PEFT draws dense matrices in bfloat16 or in float16, whichever the machine has, so "
                "they cannot be made again; take 'portable', or save the adapter in PEFT with save_projection=True"
            )
        return faults


@final
class _Sizes(NamedTuple):
    """The frozen pair of one adapter: A (rank, least), and bases of B (most, rank)."""

    rank: int
    bases: int
    least: int
    most: int

    @classmethod
    def covering(cls, rank: int, shapes: Sequence[tuple[int, int]]) -> _Sizes:
        """As PEFT sizes them: of the largest out and the largest in, which may be of two layers."""
        out, inn = (max(each) for each in zip(*shapes, strict=True))
        return cls.of(rank, out, inn)

    @classmethod
    def of(cls, rank: int, out: int, inn: int) -> _Sizes:
        return cls(rank, -(-min(out, inn) // rank), min(out, inn), max(out, inn))

    def extents(self) -> tuple[Extent, Extent]:
        """Of A, and of all B_j, whose rank comes first here: (bases rank, most)."""
        return Extent(self.rank, self.least, 0), Extent(self.rank * self.bases, self.most, 0)


def _alone(matrix: Tensor) -> Pair:
    """A matrix that is held by itself, as a pair's first one."""
    return Pair(matrix, matrix.new_empty(matrix.shape[0], 0))


@final
@dataclass(frozen=True)
class _Portable(Source):
    """One of the two endless matrices of VeRA's definition, or its signs where they are far from zero.

    which: 0 for A, 1 for B. low: below so many of 2^24 a word is -1, and 1 from 2^24 - low on; 0: uniform numbers.
    """

    seed: int
    which: int
    low: int = 0

    def build(self, extent: Extent) -> Pair:
        unit = torch.from_numpy(unit_rows(self.seed, self.which, extent.rank, extent.inn))
        if self.low:
            edge = 1.0 - self.low * 2.0**-23  # exact, as the numbers are: word * 2^-23 - 1
            unit = (unit >= edge).float() - (unit < -edge).float()
        return _alone(unit)

    def gain(self, rank: int, inn: int) -> float:
        """One over the standard deviation."""
        return math.sqrt(2.0**23 / self.low) if self.low else math.sqrt(3.0)

    def exponent(self, extent: Extent) -> int:
        return max(0, math.ceil(math.log2(max(extent.inn, 1)) / 2.0)) if self.which else 0


@final
@dataclass(frozen=True)
class _Peft(Source):
    """One of the two sparse matrices that PEFT draws, A first, each over its standard deviation."""

    seed: int
    which: int
    sizes: _Sizes
    sparsity: float

    def build(self, extent: Extent) -> Pair:
        rank, bases, least, most = self.sizes
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        kind: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        drawn = torch.rand((rank, 1, least), **kind)
        if self.which:
            drawn = torch.rand((most, bases, rank), **kind)
        edge = 1 / (2 * self.sparsity)
        signs = (drawn > 1 - edge).float() - (drawn < edge).float()
        spread = signs.std()  # before its axes are put in order, so that the sum is PEFT's
        if not bool(spread > 0):
            raise ConfigError(
                f"generator='peft': all numbers of the sparse matrix {'AB'[self.which]} {tuple(signs.shape)} are "
                "alike, so PEFT divides by zero; take another projection_prng_key, a larger r, or generator='portable'"
            )
        matrix = signs / spread
        return _alone(matrix.flatten(1).T.contiguous() if self.which else matrix.squeeze(1))

    def gain(self, rank: int, inn: int) -> float:
        return 1.0


@final
class _Frozen(Shared):
    """The holder of the matrices, where A and B come from, what an adapter needs of them, and their sizes in a file."""

    def __init__(self, projections: Projections, a: Source, b: Source, needs: dict[Source, Extent], whole: _Sizes):
        super().__init__(common=(a, b))
        self.projections, self.a, self.b, self.needs, self.whole = projections, a, b, needs, whole

    def checksum(self) -> str:
        """Of the matrices as defined; worked out once, for they never change."""
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        return pair_checksum(source.build(self.needs[source]) for source in (self.a, self.b))

    def in_file(self) -> dict[str, Tensor]:
        """As PEFT has them: A (r, 1, least), B (most, bases, r), float32 with their gains."""
        (rank, bases, _, most), (first, second) = self.whole, self.whole.extents()
        a, b = (
            (source.build(extent).a.double() * source.gain(rank, extent.inn)).float()
            for source, extent in ((self.a, first), (self.b, second))
        )
        return {KEY_A: a.unsqueeze(1), KEY_B: b.T.reshape(most, bases, rank).contiguous()}


@final
class RandLora(Method[RandLoraConfig]):
    """Parameters per layer: randlora_lambda (r, n), randlora_gamma (n, min(out, in))."""

    name: ClassVar[str] = "randlora"
    config_cls: ClassVar[type[AdapterConfig]] = RandLoraConfig
    makes: type[Delta] = LowRank
    stacks: bool = True
    usual_rate: ClassVar[Rate] = Rate(1e-3)
    example: ClassVar[Mapping[str, Any]] = {"r": 2, "randlora_alpha": 4}
    keys: Mapping[str, str] = {LAMBDA: LAMBDA, GAMMA: GAMMA}

    def __init__(
        self, config: RandLoraConfig, brought: Mapping[str, Tensor] | None = None, checksum: str | None = None
    ) -> None:
        super().__init__(config)
        self.brought, self.expected_checksum = dict(brought or {}), checksum

    def prepare(self, adapter: str, sites: Sequence[Site], projections: Projections) -> Shared:
        config = self.config
        whole = _Sizes.covering(config.r, [(site.out, site.inn) for site in sites])
        a, b = self._sources(whole)
        needs: dict[Source, Extent] = dict(zip((a, b), whole.extents(), strict=True))
        if config.generator == "portable":  # any part of these can be made without the rest
            own = [_Sizes.of(config.r, site.out, site.inn).extents() for site in sites]
            for source, extents in zip((a, b), zip(*own, strict=True), strict=True):
                needs[source] = Extent(max(e.rank for e in extents), max(e.inn for e in extents), 0)
        shared = _Frozen(projections, a, b, needs, whole)
        projections.require(adapter, needs)
        for site in sites:  # now: a compiled forward would make them each time
            for source in (a, b):
                projections.pair(source, site.device(), site.dtype())
        return shared

    def _sources(self, whole: _Sizes) -> tuple[Source, Source]:
        config = self.config
        if config.generator == "stored":
            if not self.brought:
                raise ConfigError("generator='stored' is for adapters loaded from a file; use 'portable' or 'peft'")
            a, b = self.brought[KEY_A], self.brought[KEY_B]
            wanted = ((whole.rank, 1, whole.least), (whole.most, whole.bases, whole.rank))
            if (tuple(a.shape), tuple(b.shape)) != wanted:
                raise CheckpointError(
                    f"randlora: the targeted layers of this model need {KEY_A} {wanted[0]} and {KEY_B} {wanted[1]}, "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}: the adapter was trained on another base"
                )
            pairs = [_alone(m.detach().float().cpu().contiguous()) for m in (a.squeeze(1), b.flatten(1).T)]
            first, second = (StoredSource(pair_checksum([pair]), pair) for pair in pairs)
            return first, second
        if config.generator == "peft":
            sparsity = math.sqrt(whole.least) if config.very_sparse else SPARSE
            return tuple(_Peft(config.projection_prng_key, i, whole, sparsity) for i in (0, 1))  # type: ignore[return-value]
        low = 0
        if config.ternary:  # 2^24 over twice the sparsity, in whole numbers
            low = math.isqrt(2**46 // whole.least) if config.very_sparse else 2**24 // 6
        return _Portable(config.projection_prng_key, 0, low), _Portable(config.projection_prng_key, 1, low)

    def verify(self, shared: Shared) -> None:
        assert isinstance(shared, _Frozen)
        if self.brought and self.config.generator != "stored":
            for key, defined in shared.in_file().items():
                held = self.brought[key]
                if held.shape != defined.shape or not torch.equal(held.cpu(), defined.to(held.dtype)):
                    raise CheckpointError(
                        f"randlora: {key} {tuple(held.shape)} in the file is not the one of projection_prng_key="
                        f"{self.config.projection_prng_key} and the layers of this model, {tuple(defined.shape)}"
                    )
        if self.expected_checksum is None or (actual := shared.checksum()) == self.expected_checksum:
            return
        raise CheckpointError(
            f"the projections do not match the checkpoint: expected SHA-256 {self.expected_checksum}, got {actual}; "
            "the seed, the targets or the base model's shapes differ from those at training"
        )

    def count(self, sites: Sequence[Site]) -> int:
        sizes = [_Sizes.of(self.config.r, site.out, site.inn) for site in sites]
        return sum(size.bases * (size.rank + size.least) for size in sizes)

    def init(self, site: Site, shared: Shared) -> dict[str, Tensor]:
        rank, bases, least, most = _Sizes.of(self.config.r, site.out, site.inn)
        like: dict[str, Any] = {"device": site.device(), "dtype": torch.float32}
        if not self.config.init_weights:
            return {LAMBDA: torch.randn(rank, bases, **like), GAMMA: torch.full([bases, least], 1 / most, **like)}
        gamma = torch.full([bases, least], 1 / max(bases, least), **like)
        return {LAMBDA: torch.zeros(rank, bases, **like), GAMMA: gamma}

    def first_factor(self, site: Site, shared: Shared) -> Hashable | None:
        assert isinstance(shared, _Frozen)
        sizes = _Sizes.of(self.config.r, site.out, site.inn)
        return (shared.b, sizes.rank * sizes.bases, site.inn) if site.inn > site.out else None

    def delta(self, site: Site, params: Mapping[str, Tensor], shared: Shared) -> LowRank:
        assert isinstance(shared, _Frozen)
        rank, bases, least, most = _Sizes.of(self.config.r, site.out, site.inn)
        dtype = site.dtype()
        a, _, down = shared.projections.pair(shared.a, site.device(), dtype)
        b, _, up = shared.projections.pair(shared.b, site.device(), dtype)
        gain = shared.a.gain(rank, least) * shared.b.gain(rank, most) * 2.0 ** (down + up)
        half = round(math.log2(least) / 2.0)  # gamma is about 1 / least: in float16 too small to be multiplied as it is
        gamma = params[GAMMA].to(accumulate_dtype(dtype)).unsqueeze(-3) * 2.0**half  # (..., 1, n, least)
        trained = (a[:rank, :least].unsqueeze(1) * gamma).flatten(-3, -2).to(dtype)  # (..., r n, least)
        frozen = b[: rank * bases, :most]  # (r n, most)
        scale = self.config.randlora_alpha / rank * gain * 2.0**-half
        mid = params[LAMBDA].flatten(-2)  # (..., r n)
        if site.inn <= site.out:
            return LowRank(a=trained, b=frozen.T, mid=mid, scale=scale)
        return LowRank(a=frozen, b=trained.mT, mid=mid, scale=scale)

    # -- files -----------------------------------------------------------------------------------

    def kept(self, key: str) -> Kept | None:
        return Kept.BROUGHT if key in (KEY_A, KEY_B) else super().kept(key)

    @classmethod
    def from_file(cls, config: RandLoraConfig, extra: Mapping[str, Tensor], checksum: str | None) -> RandLora:
        """PEFT writes the matrices once for the model, and once more for each layer."""
        brought = {key: extra[key] for key in (KEY_A, KEY_B) if key in extra}
        for name, tensor in extra.items():
            key = name.rpartition(".")[2]
            if key not in brought:
                raise CheckpointError(f"randlora: tensors that belong to no layer: {[name]}")
            if tensor is not brought[key] and not torch.equal(tensor, brought[key]):
                raise CheckpointError(
                    f"randlora: {name} in the file is another matrix than {key}, which all layers share"
                )
        if (brought and set(brought) != {KEY_A, KEY_B}) or (not brought and config.generator == "stored"):
            raise CheckpointError(
                "randlora: the config says that the projections are saved, but the file holds "
                f"{sorted(brought) or 'none'} of {[KEY_A, KEY_B]}"
            )
        if brought and not config.save_projection:
            raise CheckpointError(
                f"randlora: the file holds {sorted(brought)}, but its config says save_projection=False; which "
                "matrices the adapter was trained with cannot be told. Set save_projection to true there if it was "
                "these"
            )
        return cls(config, brought, checksum)

    def export(self, sites: Mapping[str, Site], params: Mapping[str, Mapping[str, Tensor]], shared: Shared) -> Export:
        assert isinstance(shared, _Frozen)
        plain = super().export(sites, params, shared)
        said = {"generator": self.config.generator}
        if self.config.generator == "stored":
            tensors, config = {**plain.tensors, **self.brought}, {"save_projection": True}
            return Export(tensors, peft=True, config=config, section=said)
        if self.config.save_projection:  # PEFT takes those in the file; we make the same ones from the seed
            return Export({**plain.tensors, **shared.in_file()}, peft=True, section=said, header=said)
        same = self.config.generator == "peft"  # it would draw others than the portable ones for the seed
        return Export(plain.tensors, peft=same, section=said, checksum=shared.checksum())
