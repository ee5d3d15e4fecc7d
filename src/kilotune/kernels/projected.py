"""P v: the vector v that a model trains, projected to one layer by frozen random numbers, and P^T g back.

::

    fastfood   v (p,) ──► padded to n = 2^k ──► M_0 v, M_1 v, ... (n each) ──► joined, the first ``rows`` taken
               M = H G Pi H B: B signs, Pi a permutation, G Gaussians, H Walsh-Hadamard (nothing normalised)
    dense      v (p,) ──► U v, U (rows, p) uniform in [-1, 1)

The numbers are those of :mod:`kilotune.projections.streams`. Both maps are operators of torch of their own
(``kilotune::project`` and its transpose): autograd keeps nothing but sizes for the backward, and torch.compile takes
them as they are. The streams drawn are kept per device up to :data:`KEEP_BYTES`; what does not fit is drawn anew at
each use, which is slow, and correct.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..projections import streams
from .hadamard import hadamard

__all__ = ["KEEP_BYTES", "Held", "Projection", "kept_bytes", "padded"]

# Streams kept in memory on each device. Fastfood takes 7 bytes a weight (9 above n = 2^15), a dense one 4 p.
KEEP_BYTES = 2 * 2**30
# Numbers handled at once: the temporaries stay within a CPU's cache.
AT_ONCE = 2**19


def padded(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


@final
@dataclass(frozen=True)
class Projection:
    """The projection of one layer, by its definition; drawn when it is first used.

    seed: 0 ... 2^64 - 1. site: the layer's number. rows: how many numbers the layer has. size: p, the length of the
    vector. dense: the dense form, else Fastfood.
    """

    seed: int
    site: int
    rows: int
    size: int
    dense: bool = False

    @property
    def blocks(self) -> int:
        """How many M there are, the last of which may be cut."""
        return -(-self.rows // padded(self.size))

    def forward(self, vector: Tensor) -> Tensor:
        """P vector: (size,) -> (rows,), differentiable; in the vector's dtype, float32 at least.

        Without the gain that makes the columns of unit length: the caller multiplies it into the vector.
        """
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
        result: Tensor = torch.ops.kilotune.project(wide, _signed(self.seed), self.site, self.rows, self.dense)
        return result

    def nbytes(self) -> int:
        """How many bytes its streams take when they are kept."""
        if self.dense:
            return 4 * self.rows * self.size
        size = padded(self.size)
        return self.blocks * size * (5 + _permutation_type(size).itemsize)

    def first(self) -> Iterator[Any]:
        """The streams of the first block (or row) as NumPy arrays, for a checksum."""
        if self.dense:
            yield streams.dense_rows(self.seed, self.site, 0, 1, self.size)
            return
        size = padded(self.size)
        yield streams.signs(self.seed, self.site, 0, size)
        yield streams.permutations(self.seed, self.site, size, 0, 1)
        yield streams.gaussians(self.seed, self.site, 0, size)


# -- streams, kept -----------------------------------------------------------------------------------

_kept: dict[tuple[Projection, torch.device], tuple[Tensor, ...]] = {}
_users: Counter[Projection] = Counter()
_lock = threading.RLock()  # a finalizer may run while it is held


def kept_bytes(device: torch.device | None = None) -> int:
    """The bytes of the streams kept now, on ``device`` or on all."""
    with _lock:
        found = [t for (_, place), made in _kept.items() if device in (None, place) for t in made]
    return sum(t.numel() * t.element_size() for t in found)


@final
class Held:
    """Who uses ``projections``: their streams are freed when the last such object that names them is gone.

    Copies of a model share one.
    """

    def __init__(self, projections: Iterable[Projection]) -> None:
        self.projections = tuple(projections)
        with _lock:
            _users.update(self.projections)
        weakref.finalize(self, _release, self.projections).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        return self

    def __reduce__(self) -> tuple[type[Held], tuple[tuple[Projection, ...]]]:
        return Held, (self.projections,)


def _release(projections: Sequence[Projection]) -> None:
    with _lock:
        _users.subtract(projections)
        for unused in [p for p in projections if _users[p] <= 0]:
            del _users[unused]
        for key in [key for key in _kept if key[0] not in _users]:
            del _kept[key]


def _streams(projection: Projection, device: torch.device) -> tuple[Tensor, ...]:
    made = _kept.get((projection, device))
    if made is None:
        made = tuple(t.to(device) for t in (_draw_dense if projection.dense else _draw_fastfood)(projection))
        with _lock:
            if kept_bytes(device) + projection.nbytes() <= KEEP_BYTES:
                _kept[projection, device] = made
    return made


def _draw_dense(p: Projection) -> tuple[Tensor, ...]:
    return (torch.from_numpy(streams.dense_rows(p.seed, p.site, 0, p.rows, p.size)),)


def _draw_fastfood(p: Projection) -> tuple[Tensor, ...]:
    """Signs int8, permutations int16 or int32, Gaussians float32, each (blocks, n)."""
    size = padded(p.size)
    drawn = (
        torch.empty(p.blocks, size, dtype=torch.int8, device="cpu"),
        torch.empty(p.blocks, size, dtype=_permutation_type(size), device="cpu"),
        torch.empty(p.blocks, size, dtype=torch.float32, device="cpu"),
    )
    for first, last in _parts(p.blocks, size):
        start, count = first * size, (last - first) * size
        drawn[0][first:last] = torch.from_numpy(streams.signs(p.seed, p.site, start, count)).view(-1, size)
        drawn[1][first:last] = torch.from_numpy(streams.permutations(p.seed, p.site, size, first, last - first))
        drawn[2][first:last] = torch.from_numpy(streams.gaussians(p.seed, p.site, start, count)).view(-1, size)
    return drawn


def _permutation_type(size: int) -> torch.dtype:
    return torch.int16 if size <= 2**15 else torch.int32


def _parts(blocks: int, size: int, at_once: int = AT_ONCE) -> Iterator[tuple[int, int]]:
    step = max(1, at_once // size)
    return ((first, min(first + step, blocks)) for first in range(0, blocks, step))


# -- the operators -----------------------------------------------------------------------------------


def _signed(seed: int) -> int:
    """A seed as an operator's argument, which is an int64: the same 64 bits."""
    return seed - 2**64 if seed >= 2**63 else seed


def _project(vector: Tensor, seed: int, site: int, rows: int, dense: bool) -> Tensor:
    p = Projection(seed % 2**64, site, rows, vector.shape[0], dense)
    drawn = _streams(p, vector.device)
    with torch.autocast(vector.device.type, enabled=False):
        if dense:
            return drawn[0].to(vector.dtype) @ vector
        size = padded(p.size)
        signs, order, gauss = drawn
        v = torch.nn.functional.pad(vector, (0, size - p.size))  # (n,)
        y = vector.new_empty(p.blocks, size)
        for first, last in _parts(p.blocks, size, _at_once(vector)):
            u = hadamard(signs[first:last] * v)  # (some blocks, n)
            u = u.gather(1, order[first:last].long()) * gauss[first:last]
            y[first:last] = hadamard(u)
        return y.view(-1)[:rows].clone() if p.rows < y.numel() else y.view(-1)


def _project_back(gradient: Tensor, seed: int, site: int, size: int, dense: bool) -> Tensor:
    p = Projection(seed % 2**64, site, gradient.shape[0], size, dense)
    drawn = _streams(p, gradient.device)
    with torch.autocast(gradient.device.type, enabled=False):
        if dense:
            return drawn[0].to(gradient.dtype).T @ gradient
        n = padded(size)
        signs, order, gauss = drawn
        total = gradient.new_zeros(n)
        for first, last in _parts(p.blocks, n, _at_once(gradient)):
            g = gradient[first * n : last * n]
            g = torch.nn.functional.pad(g, (0, (last - first) * n - g.shape[0])).view(-1, n)  # (some blocks, n)
            u = hadamard(g) * gauss[first:last]
            u = torch.empty_like(u).scatter_(1, order[first:last].long(), u)
            total += (hadamard(u) * signs[first:last]).sum(0)
        return total[:size].clone()


def _at_once(like: Tensor) -> int:
    return AT_ONCE if like.device.type == "cpu" else 64 * AT_ONCE  # a GPU wants fewer, larger kernels


def _keep_sizes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.length = inputs[0].shape[0]
    ctx.definition = inputs[1], inputs[2]
    ctx.dense = inputs[4]


def _project_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.kilotune.project_back(g.contiguous(), *ctx.definition, ctx.length, ctx.dense)
    return back, None, None, None, None


def _back_gradient(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    forward = torch.ops.kilotune.project(g.contiguous(), *ctx.definition, ctx.length, ctx.dense)
    return forward, None, None, None, None


_library = torch.library.Library("kilotune", "DEF")  # type: ignore[no-untyped-call]
for _name, _run, _gradient in (
    ("project", _project, _project_gradient),
    ("project_back", _project_back, _back_gradient),
):
    _schema = f"{_name}(Tensor x, int seed, int site, int length, bool dense) -> Tensor"
    _library.define(_schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(
        f"kilotune::{_name}", lambda x, seed, site, length, dense: x.new_empty(length), lib=_library
    )
    torch.library.register_autograd(f"kilotune::{_name}", _gradient, setup_context=_keep_sizes, lib=_library)
