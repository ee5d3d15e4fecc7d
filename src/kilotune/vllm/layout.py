"""The numbers of an adapter as one row, and what of it one worker of several keeps.

::

    whole row    for each layer, by name:  d (rank)  b (out)
    local row    for each fused layer:     the d of its parts, one after the other; their b, this worker's part of each

A worker that holds some layers, or a part of each, cuts its local row out of the whole one. The gains of the frozen
matrices (docs/projections.md) are in d, and an adapter of a smaller rank has zeros behind its own d: U_A and U_B are
endless, so its matrices are the first rows of the larger ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from ..errors import CheckpointError, UnsupportedError
from ..projections.matrices import Extent, Pair, PortableSource

__all__ = ["Cut", "Layout", "Part", "Site"]


@final
@dataclass(frozen=True, order=True)
class Site:
    """A layer by its name in the checkpoint, with its whole size."""

    name: str
    out: int
    inn: int


@final
@dataclass(frozen=True)
class Layout:
    """What a whole row is made of."""

    rank: int
    seed: int
    sites: tuple[Site, ...]

    @classmethod
    def of(cls, rank: int, seed: int, sites: Iterable[Site]) -> Layout:
        """From layers in any order, such as those that several workers named."""
        return cls(rank, seed, tuple(sorted(set(sites))))

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each layer's numbers begin."""
        found, begin = {}, 0
        for site in self.sites:
            found[site.name] = begin
            begin += self.rank + site.out
        return found

    @cached_property
    def by_name(self) -> dict[str, Site]:
        """The layers by name."""
        return {site.name: site for site in self.sites}

    @cached_property
    def numbers(self) -> int:
        """How many numbers a row has."""
        return sum(self.rank + site.out for site in self.sites)

    @property
    def source(self) -> PortableSource:
        """The frozen matrices."""
        return PortableSource(self.seed)

    @cached_property
    def extent(self) -> Extent:
        """How much of the matrices all layers need."""
        return Extent(self.rank, max(site.inn for site in self.sites), max(site.out for site in self.sites))

    @cached_property
    def exponent(self) -> int:
        """A is held smaller by 2 to this power, and d larger (:class:`~kilotune.projections.matrices.Pair`)."""
        return self.source.exponent(self.extent)

    def row(self, numbers: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The whole row (float32) of an adapter's d (its rank,) and b (out,) by layer; zeros where it has none."""
        row = torch.zeros(self.numbers, dtype=torch.float32)
        for name, (d, b) in numbers.items():
            site, begin = self.by_name[name], self.places[name]
            gain = self.source.gain(len(d), site.inn) * 2.0**self.exponent
            row[begin : begin + len(d)] = (d.double() * gain).float()
            row[begin + self.rank : begin + self.rank + site.out] = b
        return row

    def to_json(self) -> str:
        """One text for equal layouts."""
        sites = [[site.name, site.out, site.inn] for site in self.sites]
        return json.dumps({"rank": self.rank, "seed": self.seed, "sites": sites}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The reverse of :meth:`to_json`."""
        values: dict[str, Any] = json.loads(text)
        sites = tuple(Site(str(name), int(out), int(inn)) for name, out, inn in values["sites"])
        return cls(int(values["rank"]), int(values["seed"]), sites)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of :meth:`to_json`, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@final
@dataclass(frozen=True)
class Part:
    """One layer of the checkpoint within a fused one, as one worker has it.

    site: the whole layer. rows: (begin, end) of the outputs that this worker has. at: where they begin in the fused
    layer's output. columns: (begin, end) of the inputs that it has.
    """

    site: Site
    rows: tuple[int, int]
    at: int
    columns: tuple[int, int]


@final
class Cut:
    """Which numbers of a whole row are a worker's local one, and where each fused layer's begin.

    layers: the parts of each fused layer, in the order of their outputs, by its name in the engine, in the model's
    order. final: whether the model's last layers are here.
    """

    def __init__(self, rank: int, seed: int, layers: Mapping[str, Sequence[Part]], *, final: bool = True) -> None:
        self.rank, self.seed, self.final = rank, seed, final
        self.layers = {name: tuple(parts) for name, parts in layers.items()}
        if not any(self.layers.values()):
            raise UnsupportedError("none of the targets is a layer of this model that can be adapted")
        self.begins: dict[str, int] = {}
        self.numbers = 0
        for name, parts in self.layers.items():
            self.begins[name] = self.numbers
            self.numbers += sum(rank + part.rows[1] - part.rows[0] for part in parts)
        self._known: dict[str, tuple[tuple[int, int], ...]] = {}

    @property
    def sites(self) -> list[Site]:
        """The layers of this worker, whole."""
        return [part.site for parts in self.layers.values() for part in parts]

    def local(self, row: Tensor, layout: str) -> Tensor:
        """The numbers that this worker needs of a whole row of ``layout`` (its JSON text); a new tensor.

        Raises:
            CheckpointError: the row is not of this engine.

        """
        if (spans := self._known.get(layout)) is None:
            spans = self._spans(Layout.from_json(layout))
            self._known = {layout: spans}
        return torch.cat([row[begin:end] for begin, end in spans])

    def _spans(self, whole: Layout) -> tuple[tuple[int, int], ...]:
        lacking = [site.name for site in self.sites if whole.by_name.get(site.name) != site]
        theirs, mine = (whole.rank, whole.seed, whole.exponent), (self.rank, self.seed, self.own.exponent)
        if theirs != mine or lacking:
            raise CheckpointError(
                f"the row is of (rank, seed, exponent) {theirs}, this engine of {mine}"
                + (f"; layers that do not fit: {lacking[:3]}" if lacking else "")
            )
        spans: list[tuple[int, int]] = []
        for parts in self.layers.values():
            begins = [whole.places[part.site.name] for part in parts]
            spans += [(begin, begin + self.rank) for begin in begins]
            spans += [
                (begin + self.rank + part.rows[0], begin + self.rank + part.rows[1])
                for begin, part in zip(begins, parts)
            ]
        return tuple(spans)

    @cached_property
    def own(self) -> Layout:
        """The layout of this worker's layers alone."""
        return Layout.of(self.rank, self.seed, self.sites)

    def matrices(self, device: torch.device, dtype: torch.dtype) -> Pair:
        """A (rank, in) and B (rank, out) for all layers of this worker, A held smaller by 2^exponent."""
        a, b, _ = self.own.source.build(self.own.extent)
        exponent = self.own.exponent
        return Pair((a * 2.0**-exponent).to(device, dtype), b.to(device, dtype), exponent)
