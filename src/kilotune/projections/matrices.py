"""The frozen random matrices, defined by a page of arithmetic (docs/projections.md).

::

    seed s, matrix m (A = 0, B = 1), row k ──► Philox4x64-10, key (s, m), counter (0, 0, k, block)
                                           ──► 64-bit outputs, low 32 bits first ──► word w
                                           ──► (w >> 8) * 2^-23 - 1   in [-1, 1), exact in float32

Row k does not depend on how many rows or columns are asked for, so everything nests: any rank, any
layer shape and any set of targets is a prefix of the same two endless matrices U_A and U_B, and one
copy in memory serves them all. A layer of shape (out, in) at rank r uses

    A = sqrt(6 / in) * U_A[:r, :in]        B = sqrt(6 / r) * U_B[:r, :out]^T      (Kaiming uniform)

The gains are scalars, so they are folded into the layer's vectors and never need matrices of their own.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, final

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError

__all__ = [
    "Extent",
    "PeftSource",
    "PortableSource",
    "Projections",
    "Source",
    "StoredSource",
    "pair_checksum",
    "unit_rows",
]

MATRIX_A, MATRIX_B = 0, 1
SEED_LIMIT = 2**64


def check_seed(seed: int) -> int:
    """Return ``seed`` if it is an integer in [0, 2^64), else raise :class:`ConfigError`."""
    if type(seed) is not int or not 0 <= seed < SEED_LIMIT:  # True is an int too, but no seed
        raise ConfigError(f"projection seed: expected an integer in 0 ... 2**64 - 1, got {seed!r}")
    return seed


def block_of_shape(out: int, inn: int) -> int:
    """Counter word 3 of the pair that belongs to the layer shape (out, in) alone: 1 + in * 2^32 + out."""
    if not (0 < out < 2**32 and 0 < inn < 2**31):
        raise ConfigError(f"layer shape ({out}, {inn}): out must be below 2**32 and in below 2**31")
    return 1 + inn * 2**32 + out


def unit_rows(
    seed: int,
    matrix: int,
    rows: int,
    columns: int,
    *,
    shape: tuple[int, int] | None = None,
    first_row: int = 0,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows ``first_row ... first_row + rows - 1`` of the endless matrix U_A or U_B.

    Args:
        seed: the seed s, 0 <= s < 2^64.
        matrix: 0 for U_A, 1 for U_B.
        rows: how many rows (rank indices).
        columns: how many columns (feature indices), counted from 0.
        shape: None for the nested pair; (out, in) for the pair of that layer shape.
        first_row: the first rank index.

    Returns:
        float32 array (rows, columns) with entries on the grid of 2^-23 in [-1, 1).

    Source: DESIGN section 3; docs/projections.md states the arithmetic and golden numbers.

    """
    key = np.array([check_seed(seed), matrix], dtype=np.uint64)
    block = 0 if shape is None else block_of_shape(*shape)
    counter = np.array([0, 0, 0, block], dtype=np.uint64)
    words = np.empty((rows, columns), dtype=np.uint32)
    for i in range(rows):
        counter[2] = first_row + i
        raw = np.random.Philox(key=key, counter=counter).random_raw((columns + 1) // 2)
        words[i] = raw.astype("<u8", copy=False).view("<u4")[:columns]  # low half first
    unit = (words >> np.uint32(8)).astype(np.float32)
    unit *= np.float32(2.0**-23)
    unit -= np.float32(1.0)
    return unit


class Extent(NamedTuple):
    """How much of a pair is needed: rank rows, columns of A (in) and columns of U_B (out)."""

    rank: int
    inn: int
    out: int

    def union(self, other: Extent) -> Extent:
        return Extent(max(self.rank, other.rank), max(self.inn, other.inn), max(self.out, other.out))


class Pair(NamedTuple):
    """A projection pair, both stored with the rank first: a (rank, in), b (rank, out).

    ``a`` is the matrix divided by 2^exponent: exact, and what a float16 product needs, for which the sum over
    thousands of inputs without the gain would be too large.
    """

    a: Tensor
    b: Tensor
    exponent: int = 0


class Source(ABC):
    """Where one pair of frozen matrices comes from; hashable, so equal sources share one copy."""

    @abstractmethod
    def build(self, extent: Extent) -> Pair:
        """The defining float32 matrices on the CPU, at least as large as ``extent``."""

    @abstractmethod
    def gain(self, rank: int, inn: int) -> float:
        """The scalar that a layer with ``inn`` inputs multiplies into B diag(d) A."""

    def exponent(self, extent: Extent) -> int:
        """The power of two by which A is held smaller; 0 where the matrices have their gains in them."""
        return 0

    @property
    def known(self) -> bool:
        """Whether :meth:`build` can give them; False where they were to be made of a weight that was not there."""
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Source:
        return self  # frozen, and a stored one holds its matrices


@final
@dataclass(frozen=True)
class PortableSource(Source):
    """The counter-based matrices: the same bits on every machine, and growable.

    ``shape`` is None for the nested pair that all layers share, (out, in) for a pair of that shape alone.
    """

    seed: int
    shape: tuple[int, int] | None = None

    def build(self, extent: Extent) -> Pair:
        a = unit_rows(self.seed, MATRIX_A, extent.rank, extent.inn, shape=self.shape)
        b = unit_rows(self.seed, MATRIX_B, extent.rank, extent.out, shape=self.shape)
        return Pair(torch.from_numpy(a), torch.from_numpy(b))

    def gain(self, rank: int, inn: int) -> float:
        return math.sqrt(6.0 / max(inn, 1)) * math.sqrt(6.0 / rank)

    def exponent(self, extent: Extent) -> int:
        return max(0, math.ceil(math.log2(max(extent.inn, 1) / 6.0) / 2.0))


@final
@dataclass(frozen=True)
class PeftSource(Source):
    """The matrices of PEFT's seed-only checkpoints, bit for bit.

    PEFT draws A (rank, in) and then B (out, rank) from one torch CPU generator, uniform in
    +- sqrt(6 / fan_in), in the largest in and out of all targeted layers. So the extent is part of the
    definition: the same key with other targets gives other matrices.
    """

    seed: int
    extent: Extent

    def build(self, extent: Extent) -> Pair:
        if self.extent.union(extent) != self.extent:
            raise ConfigError(f"PEFT's projections of extent {self.extent} do not cover {extent}")
        rank, inn, out = self.extent
        # torch's generator takes seeds up to 2^64 - 1, as manual_seed documents
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        # The bound in the order of operations that fixes its last bit: sqrt(3) * (sqrt(2) / sqrt(fan_in)).
        bound_a = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(max(inn, 1)))
        bound_b = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(rank))
        # On the CPU whatever the default device is: its stream is the definition.
        a = torch.empty(rank, inn, dtype=torch.float32, device="cpu").uniform_(-bound_a, bound_a, generator=generator)
        b = torch.empty(out, rank, dtype=torch.float32, device="cpu").uniform_(-bound_b, bound_b, generator=generator)
        return Pair(a, b.T.contiguous())

    def gain(self, rank: int, inn: int) -> float:
        return 1.0


@final
@dataclass(frozen=True)
class StoredSource(Source):
    """Matrices that came with a checkpoint; equal files share one copy through ``checksum``."""

    checksum: str
    pair: Pair = field(compare=False, repr=False)

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> StoredSource:
        """From A (rank, in) and B (out, rank) as PEFT stores them; kept as float32 on the CPU."""
        pair = Pair(a.detach().float().cpu().contiguous(), b.detach().float().cpu().T.contiguous())
        return cls(pair_checksum([pair]), pair)

    @property
    def extent(self) -> Extent:
        return Extent(self.pair.a.shape[0], self.pair.a.shape[1], self.pair.b.shape[1])

    def build(self, extent: Extent) -> Pair:
        if extent != self.extent:  # PEFT makes them in the largest shape of the targets: another size, another base
            have = self.extent
            raise CheckpointError(
                f"the stored projections are of rank {have.rank}, in {have.inn}, out {have.out}, but the targeted "
                f"layers of this model need rank {extent.rank}, in {extent.inn}, out {extent.out}: the adapter was "
                "trained on another base"
            )
        return self.pair

    def gain(self, rank: int, inn: int) -> float:
        return 1.0


S = TypeVar("S", bound=Source)


def pair_checksum(pairs: Iterable[Pair]) -> str:
    """SHA-256 (hex) over the float32 little-endian bytes of the pairs' a and b, in order."""
    digest = hashlib.sha256()
    for pair in pairs:
        for tensor in (pair.a, pair.b):
            digest.update(f"{tuple(tensor.shape)};".encode())
            digest.update(np.ascontiguousarray(tensor.detach().cpu().float().numpy(), dtype="<f4").tobytes())
    return digest.hexdigest()


@final
class _Wanted:
    """How many adapters want each size of one source; there are few different sizes, and may be many adapters."""

    def __init__(self) -> None:
        self._counts: tuple[Counter[int], Counter[int], Counter[int]] = (Counter(), Counter(), Counter())

    def add(self, extent: Extent) -> None:
        for counts, size in zip(self._counts, extent, strict=True):
            counts[size] += 1

    def drop(self, extent: Extent) -> None:
        for counts, size in zip(self._counts, extent, strict=True):
            counts[size] -= 1
            if not counts[size]:
                del counts[size]

    def largest(self) -> Extent | None:
        """The extent that serves all; None where nobody wants any."""
        rank, inn, out = self._counts
        return Extent(max(rank), max(inn), max(out)) if rank else None


@final
class Projections(nn.Module):
    """The one holder of all frozen matrices of a model.

    It registers no buffer and no parameter: nothing of it is in a state dict, DDP does not broadcast it,
    and ``.half().float()`` cannot change its bits, because each copy in a dtype or on a device is derived
    anew from the definition. Adapters state what they need with :meth:`require`; equal sources share one
    copy of the largest extent. Layers keep unregistered references to the holder.

    What an adapter costs here grows with its own needs, and not with how many other adapters there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._needs: dict[str, dict[Source, Extent]] = {}
        self._extents: dict[Source, Extent] = {}
        self._held: dict[Source, Source] = {}  # the first of those that are equal
        self._wanted: dict[Source, _Wanted] = {}  # follows from _needs
        self._copies: dict[tuple[Source, torch.device, torch.dtype], Pair] = {}
        self._places: set[tuple[torch.device, torch.dtype]] = set()  # where copies are, or have been

    def require(self, owner: str, needs: dict[Source, Extent]) -> None:
        """Let the adapter ``owner`` use ``needs``; grows what is there where it is too small."""
        before = self._needs.get(owner, {})
        self._needs[owner] = dict(needs)
        self._recount(before, needs)

    def release(self, owner: str) -> None:
        """Forget what the adapter ``owner`` needed; matrices that nobody needs are freed."""
        self._recount(self._needs.pop(owner, {}), {})

    def pair(self, source: Source, device: torch.device, dtype: torch.dtype) -> Pair:
        """The pair of ``source`` on ``device`` in ``dtype``: a (R, IN), b (R, OUT), R, IN, OUT as needed.

        ``a`` is the matrix divided by 2^exponent; the caller multiplies that into its scale.
        """
        pair = self._copies.get((source, device, dtype))
        return pair if pair is not None else self._derive(source, device, dtype)

    def held(self, source: S) -> S | None:
        """The source equal to ``source`` that some adapter needs, with all that it has; None where there is none.

        So what takes long to make (factors of a weight) is made once for all the adapters of a model.
        """
        found = self._held.get(source)
        return found if isinstance(found, type(source)) else None

    def owners(self) -> list[str]:
        """The adapters that need something."""
        return list(self._needs)

    def extents(self) -> dict[Source, Extent]:
        """The extent held for each source."""
        return dict(self._extents)

    def tensors(self) -> list[Tensor]:
        """All tensors held now (for memory reports)."""
        return [tensor for pair in self._copies.values() for tensor in (pair.a, pair.b)]

    def extra_repr(self) -> str:
        return ", ".join(f"{source}: {tuple(extent)}" for source, extent in self._extents.items())

    def _recount(self, before: Mapping[Source, Extent], now: Mapping[Source, Extent]) -> None:
        """Settle what changes when one adapter needs ``now`` and no longer ``before``."""
        for source, extent in now.items():
            self._wanted.setdefault(source, _Wanted()).add(extent)
        for source, extent in before.items():
            self._wanted[source].drop(extent)
        stale = [key for source in {**before, **now} for key in self._resize(source)]
        for key in stale:  # what was in use stays ready, so a compiled forward never builds it
            self.pair(*key)

    def _resize(self, source: Source) -> list[tuple[Source, torch.device, torch.dtype]]:
        """Hold ``source`` in the extent wanted now; gives the copies that have to be made anew."""
        extent = self._wanted[source].largest()
        if extent == self._extents.get(source):
            return []
        if extent is None:
            del self._wanted[source], self._extents[source], self._held[source]
        else:
            self._extents[source] = extent
            self._held.setdefault(source, source)
        held = [(source, *place) for place in self._places if (source, *place) in self._copies]
        for key in held:
            del self._copies[key]
        return [] if extent is None else held

    @torch.inference_mode(False)  # tensors made in inference mode could never serve a training step
    def _derive(self, source: Source, device: torch.device, dtype: torch.dtype) -> Pair:
        extent = self._extents[source]
        if device.type == "meta":
            pair = Pair(
                torch.empty(extent.rank, extent.inn, device=device, dtype=dtype),
                torch.empty(extent.rank, extent.out, device=device, dtype=dtype),
            )
        else:
            a, b, _ = source.build(extent)
            exponent = source.exponent(extent)
            a = a if exponent == 0 else a * 2.0**-exponent
            pair = Pair(a.to(device=device, dtype=dtype), b.to(device=device, dtype=dtype), exponent)
        self._places.add((device, dtype))
        self._copies[(source, device, dtype)] = pair
        return pair

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Projections:
        """Follow ``.to``, ``.half``, ``.cuda``: ask ``fn`` where it sends a probe, and derive anew there."""
        wanted = set()
        for source, device, dtype in self._copies:
            probe = fn(torch.empty(0, device=device, dtype=dtype))
            wanted.add((source, probe.device, probe.dtype))
        self._copies = {key: pair for key, pair in self._copies.items() if key in wanted}
        self._places = {key[1:] for key in wanted}
        for key in sorted(wanted, key=str):
            if key[0].known or key[1].type == "meta":  # whose use says what is wrong; the rest of a model may move
                self.pair(*key)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What follows from the rest, and matrices that the definition gives back, need not be written by torch.save.
        kept = {key: value for key, value in self.__dict__.items() if key != "_wanted"}
        return {**kept, "_copies": {}, "_places": list(self._copies)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        copies = state.pop("_places")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._wanted, self._places = _by_source(self._needs.values()), set()
        for source, device, dtype in copies:  # the rest is derived at its first use
            if _available(device) and (source.known or device.type == "meta"):
                self.pair(source, device, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Projections:
        """A new holder that shares the frozen tensors: they never change, so a copy would only cost memory."""
        twin = Projections()
        memo[id(self)] = twin
        twin._needs = {owner: dict(needs) for owner, needs in self._needs.items()}
        twin._extents, twin._held = dict(self._extents), dict(self._held)
        twin._wanted = _by_source(twin._needs.values())
        twin._copies, twin._places = dict(self._copies), set(self._places)
        return twin


def _by_source(needs: Iterable[Mapping[Source, Extent]]) -> dict[Source, _Wanted]:
    found: dict[Source, _Wanted] = {}
    for source, extent in (item for own in needs for item in own.items()):
        found.setdefault(source, _Wanted()).add(extent)
    return found


def _available(device: torch.device) -> bool:
    return device.type in ("cpu", "meta") or bool(torch.get_device_module(device.type).is_available())
