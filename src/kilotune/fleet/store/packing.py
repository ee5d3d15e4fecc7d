"""The numbers of an adapter as one flat row of bytes, and back.

Three packings. ``float32``: every tensor in its own type, bit for bit. ``bfloat16``: floats of more than 16 bits are
rounded to bfloat16 (8 significant bits, so each number is off by 2^-8 of itself at most). ``int8``: a vector v becomes
round(v / s) in -127 ... 127 with its own scale s = max|v| / 127, kept in float32, so each number is off by half of s at
most. A vector is a tensor of one dimension (VeRA's b and d); a matrix (a LoRA factor) is cut into vectors along its
longer side, so that scales are few. Tensors of modules saved whole are rounded to bfloat16 at most, and those that are
no floats are never rounded.

::

    payload    numbers of 8 bytes | of 4 | scales (float32) | numbers of 2 bytes | of 1, int8 vectors among them
    entries    in the same order; within one size by key

What is kept of a layout is each entry's key, shape, type and packing; offsets follow from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import CheckpointError, gather

__all__ = ["Entry", "Layout"]

EXACT = "exact"
STEPS = 127
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@final
@dataclass(frozen=True)
class Entry:
    """One tensor in a row. key: in the file. dtype: its own, as torch names it. packed: "exact", "bfloat16", "int8"."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    packed: str

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one number, as it is packed."""
        return {"bfloat16": 2, "int8": 1}.get(self.packed) or DTYPES[self.dtype].itemsize

    @property
    def vectors(self) -> tuple[int, int]:
        """(how many vectors with a scale of their own, the length of each)."""
        if self.numbers == 0:
            return 0, 0
        if len(self.shape) < 2:
            return 1, self.numbers
        rows, columns = self.shape[0], self.numbers // self.shape[0]
        return (columns, rows) if rows > columns else (rows, columns)

    @property
    def turned(self) -> bool:
        """Whether its vectors are the columns of the tensor seen as (first dimension, all others)."""
        return len(self.shape) > 1 and self.numbers > 0 and self.vectors[1] == self.shape[0] > self.vectors[0]


@final
@dataclass(frozen=True)
class Layout:
    """The entries of a row, in their order, and the packing that was asked for."""

    packing: str
    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], packing: str, whole: frozenset[str] = frozenset()) -> Layout:
        """How ``tensors`` are packed; ``whole``: keys of modules saved whole, which get no int8.

        Raises:
            CheckpointError: a type of number that no checkpoint has.

        """
        entries = [
            Entry(key, tuple(value.shape), dtype, _packed(value.dtype, packing, key in whole))
            for key, value in tensors.items()
            if (dtype := str(value.dtype).removeprefix("torch.")) in DTYPES
        ]
        if len(entries) != len(tensors):
            strange = [f"{key}: {v.dtype}" for key, v in tensors.items() if v.dtype not in DTYPES.values()]
            raise CheckpointError(gather("types of numbers that a store does not keep:", strange))
        return cls(packing, tuple(sorted(entries, key=lambda entry: (-entry.width, entry.key))))

    @cached_property
    def numbers(self) -> int:
        """All numbers of a row."""
        return sum(entry.numbers for entry in self.entries)

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """(begin, end) of each entry's numbers in the row that :meth:`vector` gives."""
        found, begin = {}, 0
        for entry in self.entries:
            found[entry.key] = (begin, begin + entry.numbers)
            begin += entry.numbers
        return found

    @cached_property
    def _groups(self) -> tuple[_Group, ...]:
        """Neighbours of one type, with their bytes; the scales stand before what has two bytes and less."""
        groups: list[_Group] = []
        scales = sum(entry.vectors[0] for entry in self.entries if entry.packed == "int8")
        offset, scale_offset = 0, -1
        kinds = dict.fromkeys((entry.width, entry.dtype, entry.packed) for entry in self.entries)
        for width, dtype, packed in sorted(kinds, key=lambda kind: (-kind[0], kind[1], kind[2])):
            if width < 4 and scale_offset < 0:
                scale_offset, offset = offset, offset + 4 * scales
            own = tuple(e for e in self.entries if (e.width, e.dtype, e.packed) == (width, dtype, packed))
            groups.append(_Group(own, dtype, packed, offset, scale_offset if packed == "int8" else -1))
            offset += width * groups[-1].numbers
            if packed == "int8":
                scale_offset += 4 * groups[-1].scales
        return tuple(groups)

    @cached_property
    def size(self) -> int:
        """Bytes of a packed row."""
        return sum(e.width * e.numbers + (4 * e.vectors[0] if e.packed == "int8" else 0) for e in self.entries)

    # -- out and in ------------------------------------------------------------------------------

    def pack(self, tensors: Mapping[str, Tensor]) -> bytes:
        """The row of ``tensors``, which have this layout's keys, shapes and types.

        Raises:
            CheckpointError: rounding would make a finite number infinite, or int8 is to hold what is not finite.

        """
        row = bytearray(self.size)
        with torch.no_grad():
            for group in self._groups:
                group.pack(tensors, row)
        return bytes(row)

    def unpack(self, row: bytes) -> dict[str, Tensor]:
        """The tensors of a row, in their own types; new ones."""
        self.check(row)
        found: dict[str, Tensor] = {}
        for group in self._groups:
            found.update(group.unpack(row))
        return found

    def vector(self, row: bytes) -> Tensor:
        """(numbers,) float32: the entries one after the other, each flattened as torch does; a new tensor."""
        self.check(row)
        if len(self._groups) == 1 and self._groups[0].is_plain:
            return self._groups[0].flat(row)
        found = self.unpack(row)
        parts = [found[entry.key].reshape(-1).to(torch.float32) for entry in self.entries]
        return torch.cat(parts) if parts else torch.zeros(0)

    def check(self, row: bytes) -> None:
        """Refuse a row of another length."""
        if len(row) != self.size:
            raise CheckpointError(f"the packed numbers are damaged: expected {self.size} bytes, got {len(row)}")

    # -- JSON ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"packing": self.packing, "entries": [[e.key, list(e.shape), e.dtype, e.packed] for e in self.entries]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """The reverse of :meth:`to_json`."""
        entries = [
            Entry(str(key), tuple(int(n) for n in shape), str(dtype), str(packed))
            for key, shape, dtype, packed in values["entries"]
        ]
        return cls(str(values["packing"]), tuple(entries))


def _packed(dtype: torch.dtype, packing: str, whole: bool) -> str:
    if packing == "float32" or not dtype.is_floating_point:
        return EXACT
    if packing == "int8" and not whole:
        return "int8"
    return "bfloat16" if dtype.itemsize > 2 else EXACT


@final
@dataclass(frozen=True)
class _Group:
    """Entries of one type and packing, whose numbers stand together from ``offset`` on."""

    entries: tuple[Entry, ...]
    dtype: str
    packed: str
    offset: int
    scale_offset: int

    @cached_property
    def numbers(self) -> int:
        return sum(entry.numbers for entry in self.entries)

    @cached_property
    def scales(self) -> int:
        return sum(entry.vectors[0] for entry in self.entries)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """How long each vector with a scale of its own is."""
        each: list[int] = []
        for entry in self.entries:
            each += [entry.vectors[1]] * entry.vectors[0]
        return np.array(each, dtype=np.int64)

    @property
    def is_plain(self) -> bool:
        return self.packed == EXACT and self.dtype == "float32"

    def pack(self, tensors: Mapping[str, Tensor], row: bytearray) -> None:
        parts = [_laid(tensors[entry.key], entry, self.packed) for entry in self.entries]
        flat = (torch.cat(parts) if len(parts) > 1 else parts[0]).detach()
        if self.packed == "int8":
            self._pack_int8(flat.to(torch.float32).numpy(), row)
            return
        if self.packed == "bfloat16":
            rounded = flat.to(torch.bfloat16)
            if not bool(torch.equal(torch.isfinite(rounded), torch.isfinite(flat))):
                raise CheckpointError("packing 'bfloat16': numbers above 3.39e38 would become infinite; use 'float32'")
            flat = rounded
        data = flat.contiguous().view(torch.uint8).numpy().data
        row[self.offset : self.offset + len(data)] = data

    def _pack_int8(self, flat: NDArray[np.float32], row: bytearray) -> None:
        if flat.size == 0:
            return
        if not np.isfinite(flat).all():
            bad = [entry.key for entry in self.entries]
            raise CheckpointError(f"packing 'int8': not all numbers are finite (among {bad[:3]}); use 'float32'")
        starts = np.concatenate(([0], np.cumsum(self.lengths)[:-1]))
        scale = (np.maximum.reduceat(np.abs(flat), starts) / np.float32(STEPS)).astype(np.float32)
        spread = np.repeat(np.where(scale == 0, np.float32(1), scale), self.lengths)
        steps = np.clip(np.rint(flat / spread), -STEPS, STEPS).astype(np.int8)
        row[self.scale_offset : self.scale_offset + 4 * self.scales] = scale.tobytes()
        row[self.offset : self.offset + self.numbers] = steps.tobytes()

    def flat(self, row: bytes) -> Tensor:
        """The numbers as they are packed, exact groups only; a new tensor."""
        dtype = torch.bfloat16 if self.packed == "bfloat16" else DTYPES[self.dtype]
        if self.numbers == 0:
            return torch.zeros(0, dtype=dtype)
        data = np.frombuffer(row, np.uint8, self.numbers * dtype.itemsize, self.offset).copy()
        return torch.from_numpy(data).view(dtype)

    def unpack(self, row: bytes) -> dict[str, Tensor]:
        if self.packed == "int8":
            flat = self._unpack_int8(row)
        else:
            flat = self.flat(row).to(DTYPES[self.dtype])
        found, begin = {}, 0
        for entry in self.entries:
            own = flat[begin : begin + entry.numbers]
            begin += entry.numbers
            if self.packed == "int8" and entry.turned:
                own = own.reshape(entry.vectors).T.contiguous()
            # A tensor of its own, so that none keeps the whole row alive, and none can be changed through another.
            found[entry.key] = own.reshape(entry.shape).clone()
        return found

    def _unpack_int8(self, row: bytes) -> Tensor:
        scale = np.frombuffer(row, np.float32, self.scales, self.scale_offset) if self.scales else np.zeros(0)
        steps = np.frombuffer(row, np.int8, self.numbers, self.offset) if self.numbers else np.zeros(0, np.int8)
        values = steps.astype(np.float32) * np.repeat(scale.astype(np.float32), self.lengths)
        return torch.from_numpy(values).to(DTYPES[self.dtype])


def _laid(value: Tensor, entry: Entry, packed: str) -> Tensor:
    """The numbers in the order in which they are packed; a flat tensor as it is, for most are."""
    if not value.is_cpu:
        value = value.cpu()
    if value.ndim == 1:
        return value
    if packed == "int8" and entry.turned:
        value = value.reshape(entry.shape[0], -1).T
    return value.reshape(-1)
