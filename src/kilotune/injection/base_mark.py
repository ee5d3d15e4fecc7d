"""Which base an adapter was trained on, in 65 letters: a mark of the base's weights, for the header of a file.

::

    1 <base64: 256 fine bits, 128 coarse bits>

Many weights are asked for a bit each, and where it goes says the weight's name, so a part of the bits tells how many of
the weights are the same, whatever else there is in either model. Two marks are held against each other so:

- Both bases in plain floats: by the fine bits, those of single weights rounded to bfloat16. float32 and bfloat16 agree
  to the bit, and of two roundings of float32 (bfloat16, float16) one weight in 16 differs. A base that was trained
  further, or into which an adapter was merged, differs in most of what that changed.
- One of them quantised: by the coarse bits, the signs of sums of 8 neighbours in some of the layers, of which 4-bit
  codes turn a few in a hundred. Other weights turn a half; a base that was trained further cannot be told.
- No mark, where the weights are not here (on meta, or sharded over processes) or are all zero: it cannot be told.

Taking it reads a few hundred numbers and, of a quantised base, 4 layers; no process waits for another. It is kept as
long as PyTorch's version counters say that the weights are the same.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import heapq
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # `import torch` has loaded it

from ..kinds import kind_of
from ..layers.adapted import AdaptedLayer
from ..storage import storage_of
from ..storage.dense import FLOATS
from ..storage.sharded import is_sharded
from .tree import layer_around, unwrapped, walk

__all__ = ["LETTERS", "mark_of", "same_base"]

FINE, COARSE = 256, 128  # bits
LAYERS, NEIGHBOURS = 4, 8  # of the coarse bits
LARGEST = 2**25  # numbers of a layer that may be read whole, where it is quantised
LETTERS = 1 + 64
# Of the 16 bits of a bfloat16; the last step of rounding turns its bit 15 in 3 cases of 10, other changes in a half.
HASH = 9973
# The first letter: what the fine bits are of. With float16 they are of other roundings than with the wider exponents.
EXACT, HALF, NONE = "1", "2", "3"
# Which part of the bits may differ. With float16, 2 of 100 fine ones do; of other weights 31 do, and not 50, for 37 are
# of no weight. Of the coarse bits 3 or 4, and 50.
MOST_EXACT, MOST_HALF, MOST_COARSE = 0.01, 0.1, 0.25


@final
class _Held(NamedTuple):
    """A weight of the base, and where it is."""

    module: nn.Module
    key: str
    value: nn.Parameter


@final
@dataclass(frozen=True)
class _Taken:
    """A mark, and what tells that it still holds: the weights that it was made of, and their versions."""

    mark: str | None
    seen: tuple[
        tuple[weakref.ref[nn.Module], str, int, int], ...
    ]  # no references to weights: torch refuses to swap those

    def holds(self) -> bool:
        """Whether the weights are the same objects in the same modules, and nobody has written into them."""
        for module_ref, key, tensor_id, version in self.seen:
            module = module_ref()
            there = None if module is None else module._parameters.get(key)
            if there is None or id(there) != tensor_id or there._version != version:
                return False
        return bool(self.seen)


_taken: weakref.WeakKeyDictionary[nn.Module, dict[frozenset[str], _Taken]] = weakref.WeakKeyDictionary()


def mark_of(root: nn.Module, without: Iterable[str] = ()) -> str | None:
    """The mark of a base model, adapters in it or not and merged or not; None where it cannot be told.

    Args:
        root: the base.
        without: the names of modules that do not matter, for an adapter brings its own (a head, drawn anew each time).

    """
    left_out = frozenset(without)
    known = _taken.setdefault(root, {})
    if left_out not in known or not known[left_out].holds():
        known[left_out] = _take(root, left_out)
    return known[left_out].mark


def same_base(one: str | None, other: str | None) -> bool | None:
    """Whether two marks are of one base's weights; None where it cannot be told."""
    first, second = _read(one), _read(other)
    if first is None or second is None:
        return None
    most = MOST_HALF if HALF in (first.fine_of, second.fine_of) else MOST_EXACT
    for mine, theirs, limit in ((first.fine, second.fine, most), (first.coarse, second.coarse, MOST_COARSE)):
        if any(mine) and any(theirs):
            return sum((a ^ b).bit_count() for a, b in zip(mine, theirs)) <= limit * 8 * len(mine)
    return None


@final
class _Bits(NamedTuple):
    fine_of: str
    fine: bytes
    coarse: bytes


def _read(mark: str | None) -> _Bits | None:
    """The bits of a mark, zeros for those that there are not; None for what is no mark of this version."""
    if mark is None or len(mark) != LETTERS or mark[0] not in (EXACT, HALF, NONE):
        return None
    try:
        whole = base64.b64decode(mark[1:], altchars="-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    return _Bits(mark[0], whole[: FINE // 8], whole[FINE // 8 :])


@torch.no_grad()
def _take(root: nn.Module, without: frozenset[str]) -> _Taken:
    held = _weights(root, without)
    if held is None:
        return _Taken(None, ())
    plain = {name: h for name, h in held.items() if h.value.dtype in FLOATS and type(h.value.data) is Tensor}
    of_layers = dict(_some_layers(held))
    coarse = _coarse({name: matrix for name, (_, matrix) in of_layers.items()})
    draws = _draws(name for name, h in plain.items() if h.value.numel())
    fine = _fine(draws, plain) if len(plain) == len(held) else None
    chosen = {name: plain[name] for name, _ in draws}
    seen = [*chosen.values(), *(own for own, _ in of_layers.values())]
    if any(h.value.is_inference() for h in seen):  # such tensors have no version
        seen = []
    refs = tuple((weakref.ref(h.module), h.key, id(h.value), h.value._version) for h in seen)
    if fine is None and coarse is None:
        return _Taken(None, refs)
    half = any(h.value.dtype == torch.float16 for h in chosen.values())
    kind = NONE if fine is None else HALF if half else EXACT
    parts = (fine or bytes(FINE // 8)) + (coarse or bytes(COARSE // 8))
    return _Taken(kind + base64.urlsafe_b64encode(parts).decode(), refs)


def _weights(root: nn.Module, without: frozenset[str]) -> dict[str, _Held] | None:
    """The base's own weights of two axes and more, by name; None where some are not here."""
    found: dict[str, _Held] = {}
    inside = tuple(f"{name}." for name in without)
    for name, module, _ in walk(root):
        if name in without or name.startswith(inside):
            continue
        own, layer = unwrapped(module), layer_around(module)
        place = name.rpartition(".")[0] if isinstance(module, AdaptedLayer) and module.kind.parameter else name
        # Of an adapted parameter only what is kept: its module has been there before it.
        parameters = own._parameters if place == name else {}
        for key, value in {**parameters, **(layer.kept if layer is not None else {})}.items():
            if value is None or (value.ndim < 2 and value.dtype in FLOATS):
                continue
            if value.is_meta or is_sharded(value) or is_sharded(value.data) or isinstance(value.data, FakeTensor):
                return None
            found[f"{place}.{key}" if place else key] = _Held(own, key, value)
    return found


def _number(*words: object) -> int:
    """A number of 128 bits, the same for the same words on any machine."""
    return int.from_bytes(hashlib.blake2b(":".join(map(str, words)).encode(), digest_size=16).digest(), "little")


def _draws(names: Iterable[str]) -> list[tuple[str, int]]:
    """(weight, number of 96 bits), 256 of them, which say what to look at.

    Each weight draws at times of its own, and the first 256 draws of all are taken: so a weight that comes to a base,
    or is missing in it, takes its own draws and moves no other's.
    """
    times = []
    for name in names:
        number = _number(name, 0)
        times.append((number % 2**32, name, 0, number // 2**32))
    heapq.heapify(times)
    found: list[tuple[str, int]] = []
    while times and len(found) < FINE:
        time, name, index, number = times[0]
        found.append((name, number))
        number = _number(name, index + 1)
        heapq.heapreplace(times, (time + number % 2**32, name, index + 1, number // 2**32))
    return found


def _fine(draws: Sequence[tuple[str, int]], floats: Mapping[str, _Held]) -> bytes | None:
    """The bit of one number for each draw, which also says where it goes; two in one place are added."""
    values = [(floats[name].value.data, number // FINE) for name, number in draws]
    codes = _codes([_at(value, number % value.numel()) for value, number in values])
    if not any(code & 0x7FFF for code in codes):  # nothing but zeros
        return None
    bits = bytearray(FINE // 8)
    for (_, number), code in zip(draws, codes):
        slot = number % FINE
        bits[slot // 8] ^= (code * HASH >> 15 & 1) << slot % 8
    return bytes(bits)


def _at(value: Tensor, place: int) -> Tensor:
    """One number of a tensor, counted row by row; a view."""
    for size in reversed(value.shape):
        place, index = divmod(place, size)
        value = value.select(-1, index)
    return value


def _codes(picked: Sequence[Tensor]) -> list[int]:
    """The 16 bits of each number as bfloat16; one copy from each device."""
    found = [0] * len(picked)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, value in enumerate(picked):
        groups.setdefault((value.device, value.dtype), []).append(index)
    for indices in groups.values():
        codes = torch.stack([picked[i] for i in indices]).to(torch.bfloat16).cpu().view(torch.int16)
        for index, code in zip(indices, codes.tolist()):
            found[index] = code & 0xFFFF
    return found


def _some_layers(held: Mapping[str, _Held]) -> Iterator[tuple[str, tuple[_Held, Tensor]]]:
    """Some linear layers' weights and matrices (out, in), the same ones whether they are quantised or not."""
    left = LAYERS
    for name in sorted(held, key=_number):
        own = held[name]
        kind, storage = kind_of(own.module), storage_of(own.module)
        if kind is None or storage is None or not kind.all_linear or storage.weight_name != own.key:
            continue
        out, inn = kind.features(own.module)
        if not 0 < out * inn <= LARGEST or storage.refusal(own.module) is not None:
            continue
        kept = {**storage.keep(own.module), own.key: own.value}
        yield name, (own, kind.canonical(own.module, storage.read(own.module, kept)))
        left -= 1
        if not left:
            return


def _coarse(matrices: Mapping[str, Tensor]) -> bytes | None:
    """Whether sums of neighbours are above zero."""
    signs: list[bool] = []
    for name, matrix in matrices.items():
        out, inn = matrix.shape
        width, rows = min(NEIGHBOURS, inn), []
        for index in range(COARSE // LAYERS):
            number = _number(name, "sum", index)
            begin = number // out % (inn - width + 1)
            rows.append(matrix[number % out, begin : begin + width])
        signs += (torch.stack(rows).float().sum(1) > 0).tolist()
    if not any(signs):
        return None
    return sum(bit << place for place, bit in enumerate(signs)).to_bytes(COARSE // 8, "little")
