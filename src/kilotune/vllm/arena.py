"""A row for each slot on the device, which token takes which, and the mathematics of VeRA for tokens of many adapters.

::

    rows 0 ... slots - 1     an adapter each
    row slots                poison: for tokens of an adapter that is not there, which never get the base's answer
    row slots + 1            zeros: for tokens of the base, and for padding
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from ..projections.matrices import Pair
from .layout import Cut, Part

__all__ = ["Arena", "FusedLayer", "Routes", "poison_row"]

CACHED = ("k_proj", "v_proj")  # what these give is kept, and read by others once it is freed
LARGE = 100.0  # far beyond what any adapter makes, and finite in float16 after a product or two


def poison_row(cut: Cut) -> Tensor:
    """A local row (float32) that spoils every logit, and nothing that is kept in the key-value cache for others.

    NaN in a freed block of the cache would reach whoever gets the block next, for a mask multiplies by zero. So NaN is
    in the model's last block only, and in a layer whose output is not cached. Where there is none among the targets,
    large finite numbers stand in the last layer: they spoil the answer, and no other.
    """
    row = torch.zeros(cut.numbers)
    last = _block(next(reversed(cut.layers)))
    if not cut.final:  # a later worker has the model's last block
        return row
    for name in reversed(cut.layers):
        begin = cut.begins[name] + cut.rank * len(cut.layers[name])
        for part in cut.layers[name] if _block(name) == last else ():
            size = part.rows[1] - part.rows[0]
            if part.site.name.rpartition(".")[2] not in CACHED:
                row[begin : begin + size] = math.nan
                return row
            begin += size
    row[cut.begins[next(reversed(cut.layers))] :] = LARGE
    return row


def _block(name: str) -> str:
    """``model.layers.3.self_attn.qkv_proj`` -> ``model.layers.3``; the name itself where no number is in it."""
    match = re.match(r"(.*\.\d+)\.", name)
    return match.group(1) if match else ""


@final
class Arena:
    """All adapters that are on the device. blocks: (slots + 2, numbers of that layer) for each fused layer by name.

    A tensor for each layer, because the rows of a wider one are gathered fifty times slower on a CPU.
    """

    def __init__(self, slots: int, cut: Cut, device: torch.device, dtype: torch.dtype) -> None:
        self.slots, self.poison, self.zero = slots, slots, slots + 1
        ends = [*list(cut.begins.values())[1:], cut.numbers]
        self._sizes = [end - begin for begin, end in zip(cut.begins.values(), ends)]
        self.blocks = {
            name: torch.zeros(slots + 2, size, device=device, dtype=dtype)
            for name, size in zip(cut.layers, self._sizes)
        }
        self.device = device
        self.pair: Pair = cut.matrices(device, dtype)
        self._spoilt = poison_row(cut).to(device, dtype)
        for block, part in zip(self.blocks.values(), self._parts(self._spoilt)):
            block[: slots + 1] = part

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor | None = None) -> None:
        """Put an adapter's local row into a slot (the name is vLLM's)."""
        row = lora_a.to(self.device, non_blocking=True)
        for block, part in zip(self.blocks.values(), self._parts(row)):
            block[index].copy_(part)

    def reset_lora(self, index: int) -> None:
        """Empty a slot: nobody gets anything of use from it."""
        self.set_lora(index, self._spoilt)

    def _parts(self, row: Tensor) -> Sequence[Tensor]:
        return torch.split(row, self._sizes)

    def row(self, index: int) -> Tensor:
        """What is in a slot, as a local row; a new tensor."""
        return torch.cat([block[index] for block in self.blocks.values()])


@final
class Routes:
    """Which row of the arena each token of a step takes. index: (tokens,), zeros behind those that there are."""

    def __init__(self, tokens: int, arena: Arena) -> None:
        self.arena = arena
        self.index = torch.full((tokens,), arena.zero, dtype=torch.int64, device=arena.device)
        self._host = torch.full((tokens,), arena.zero, dtype=torch.int64)
        self.idle = True
        """Whether no token has an adapter."""

    def set(self, ids: Sequence[int], slots: Sequence[int | None]) -> None:
        """Route a step: ids are the adapter of each token (0: the base), slots the adapter in each slot."""
        given = np.asarray(ids, dtype=np.int64)
        distinct, inverse = np.unique(given, return_inverse=True)
        places = {adapter: slot for slot, adapter in enumerate(slots) if adapter is not None}
        chosen = np.array(
            [self.arena.zero if i <= 0 else places.get(int(i), self.arena.poison) for i in distinct], dtype=np.int64
        )
        host = self._host.numpy()
        host[: len(given)] = chosen[inverse] if len(given) else 0
        host[len(given) :] = self.arena.zero
        self.index.copy_(self._host)
        self.idle = bool((distinct <= 0).all())


@final
@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring parts of a fused layer with the same rows of B: one product for all of them."""

    count: int
    rows: tuple[int, int]
    at: int
    d: int
    b: int


@final
class FusedLayer:
    """What VeRA adds to one fused layer: A x once, and a product with B for each different part of B."""

    def __init__(self, routes: Routes, rank: int, name: str, parts: Sequence[Part]) -> None:
        self.routes, self.rank, self.block = routes, rank, routes.arena.blocks[name]
        columns = {part.columns for part in parts}
        if len(columns) != 1:
            raise ValueError(f"parts of one layer with several inputs: {parts}")
        self.columns = columns.pop()
        self.groups = tuple(_groups(parts, rank))

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add each token's change to ``out`` (tokens, outputs), in place; x: (tokens, inputs)."""
        tokens, rank = x.shape[0], self.rank
        own = self.block.index_select(0, self.routes.index[:tokens])
        pair = self.routes.arena.pair
        mid = x @ pair.a[:, self.columns[0] : self.columns[1]].T
        for group in self.groups:
            count, (first, last) = group.count, group.rows
            size = last - first
            d = own[:, group.d : group.d + count * rank].view(tokens, count, rank)
            b = own[:, group.b : group.b + count * size].view(tokens, count * size)
            inner = (mid.unsqueeze(1) * d).view(tokens * count, rank)
            change = (inner @ pair.b[:, first:last]).view(tokens, count * size)
            out[:, group.at : group.at + count * size].addcmul_(change, b)


def _groups(parts: Sequence[Part], rank: int) -> list[_Group]:
    found: list[_Group] = []
    at_b = rank * len(parts)
    for i, part in enumerate(parts):
        size = part.rows[1] - part.rows[0]
        last = found[-1] if found else None
        if last is not None and last.rows == part.rows and last.at + last.count * size == part.at:
            found[-1] = _Group(last.count + 1, last.rows, last.at, last.d, last.b)
        else:
            found.append(_Group(1, part.rows, part.at, i * rank, at_b))
        at_b += size
    return found
