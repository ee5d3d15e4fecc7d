"""Many low-rank changes with the same factors in one batch: each row of it through the vectors of its own adapter.

::

    x (N, ..., in) ──a──► z (N, ..., r) ──· mid[index]──► ──b──► (N, ..., out) ──· out[index]──► change of y

a and b are one for all (VeRA's projections), so the products are two, whatever the number of adapters; only the vectors
are gathered, n of them for each row. With m_i = ``mid[index_i]``, v_i = ``out[index_i]``, s = ``scale``, h = z * m and
u = (g * v) b, where g = dL/dy and * goes over each row's tokens::

    dL/dz = s u * m        dL/dm_i = s sum_t u_it * z_it        dL/dv_i = s sum_t g_it * (h_it b^T)

and the gradient of an adapter's vector is the sum over its rows. Kept for the backward: z; and h b^T, which is of the
output's size, only where making it again costs more than keeping it (:func:`_keeps`). Sums run in float32 (float64 for
float64), and first within a row, so that the numbers that a device may add in any order are as few as the rows.

Where the factors are the adapters' own (LoRA's), :func:`lift_own` runs a batched product: the rows of an adapter are
brought together, so that its factors are read where they are and not copied for each row.
"""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import accumulate_dtype, no_view, plain

__all__ = ["Owners", "lift_own", "lift_shared", "per_row"]


@final
class Owners:
    """Which of ``count`` adapters each of N rows belongs to.

    Args:
        index: (N,) int64, each in 0 ... count - 1.
        count: the number of adapters.
        even: rows of each adapter where they stand together, in the adapters' order, as many of each; None: they do
            not, or nobody has looked (which on a GPU means to wait for it).

    """

    def __init__(self, index: Tensor, count: int, even: int | None) -> None:
        self.index, self.count, self.even = index, count, even
        self._padded: tuple[Tensor, Tensor, int] | None = None

    @classmethod
    def of(cls, index: Tensor, count: int) -> Owners:
        """Looks whether they stand evenly, if that costs nothing."""
        each, rest = divmod(index.shape[0], count)
        if index.device.type != "cpu" or rest or not each:
            return cls(index, count, None)
        even = torch.equal(index, torch.arange(count).repeat_interleave(each))
        return cls(index, count, each if even else None)

    def spread(self, times: int, device: torch.device) -> Owners:
        """Where each row stands ``times`` times, one after the other."""
        index = self.index.repeat_interleave(times).to(device)
        return Owners(index, self.count, None if self.even is None else self.even * times)

    def take(self, vectors: Tensor) -> Tensor:
        """Of vectors (count, n) each row's own: (N, n)."""
        return vectors if self.even == 1 else vectors.index_select(0, self.index)

    def padded(self) -> tuple[Tensor, Tensor, int]:
        """(rows, back, each): ``rows`` (count * each,) has each adapter's rows together, and row 0 where it has fewer.

        ``back`` (N,): where each row stands there.
        """
        if self._padded is None:
            counts = torch.bincount(self.index, minlength=self.count)
            each = int(counts.max())
            order = self.index.argsort(stable=True)
            sorted_index = self.index.index_select(0, order)
            first = counts.cumsum(0) - counts
            place = sorted_index * each + torch.arange(order.shape[0], device=order.device) - first[sorted_index]
            rows = torch.zeros(self.count * each, dtype=order.dtype, device=order.device).index_copy_(0, place, order)
            back = torch.empty_like(order).index_copy_(0, order, place)
            self._padded = rows, back, each
        return self._padded


def per_row(vectors: Tensor, like: Tensor, axis: int) -> Tensor:
    """Vectors (N, n), one for each row, so that they broadcast over ``like`` (N, ...), whose features are on ``axis``.

    Args:
        vectors: (N, n).
        like: (N, ..., n) with axis -1, or (N, n, ...) with axis 1.
        axis: -1 or 1.

    """
    between = (1,) * (like.ndim - 2)
    shape = (vectors.shape[0], *between, vectors.shape[1]) if axis == -1 else (*vectors.shape, *between)
    return vectors.view(shape)


def lift_shared(
    y: Tensor,
    z: Tensor,
    b: Tensor,
    mid: Tensor | None,
    out: Tensor | None,
    scale: float,
    owners: Owners,
    axis: int = -1,
) -> Tensor:
    """``y_i + scale * out[o_i] * (b (mid[o_i] * z_i))`` for each row i of adapter o_i, in y's dtype.

    Args:
        y: (N, ..., out), with the features on ``axis``.
        z: (N, ..., r), likewise: the input through the common first factor.
        b: (out, r), in z's dtype, not trained.
        mid: (n, r) or None for ones.
        out: (n, out) or None for ones.
        scale: a scalar.
        owners: which adapter's vectors a row takes.
        axis: -1, or 1 where the axes behind it are places (a convolution's).

    """
    index: Tensor | None = owners.index
    shape = y.shape
    if owners.even is not None and (axis == -1 or owners.even == 1):
        index = None
        if owners.even > 1:  # an adapter's rows are one
            y, z = (t.reshape(owners.count, -1, t.shape[-1]) for t in (y, z))
    if plain() or not torch.is_grad_enabled():
        return _changed(y, z, b, mid, out, scale, index, axis).view(shape)
    result: Tensor = _Shared.apply(y, z, b, mid, out, scale, index, axis)  # type: ignore[no-untyped-call]
    return result.view(shape)


def lift_own(
    x: Tensor, a: Tensor, b: Tensor, mid: Tensor | None, out: Tensor | None, scale: float, owners: Owners
) -> Tensor:
    """``scale * out[o_i] * (b[o_i] (mid[o_i] * (a[o_i] x_i)))`` for each row i, of adapter o_i: (N, ..., out).

    Args:
        x: (N, ..., in).
        a: (n, r, in), or (r, in) for all rows.
        b: (n, out, r), or (out, r).
        mid: (n, r) or None.
        out: (n, out) or None.
        scale: a scalar.
        owners: which adapter's factors a row takes.

    """
    rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)  # (N, T, in)
    count, times, wide = rows.shape
    shape = (*x.shape[:-1], b.shape[-2])
    if owners.even is not None:
        return _lifted(rows.reshape(owners.count, -1, wide), a, b, mid, out, scale).view(shape)
    places, back, each = owners.padded()
    if (places.shape[0] - count) * times > count * a.shape[-2]:  # less is copied where the factors are
        a, b = (t if t.ndim == 2 else t.index_select(0, owners.index) for t in (a, b))
        mid, out = (None if t is None else owners.take(t) for t in (mid, out))
        return _lifted(rows, a, b, mid, out, scale).view(shape)
    together = rows.index_select(0, places).view(owners.count, each * times, wide)
    lifted = _lifted(together, a, b, mid, out, scale)
    return lifted.view(places.shape[0], times, -1).index_select(0, back).view(shape)


def _lifted(x: Tensor, a: Tensor, b: Tensor, mid: Tensor | None, out: Tensor | None, scale: float) -> Tensor:
    """:func:`lift_own` of x (n, T, in) that are all of adapter n: (n, T, out)."""
    h = F.linear(x, a) if a.ndim == 2 else torch.bmm(x, a.transpose(1, 2))  # (n, T, r)
    h = _scaled(h, mid, scale, -1)
    h = F.linear(h, b) if b.ndim == 2 else torch.bmm(h, b.transpose(1, 2))  # (n, T, out)
    return _scaled(h, out, 1.0, -1)


def _scaled(h: Tensor, vectors: Tensor | None, scale: float, axis: int) -> Tensor:
    """``h * vectors * scale`` in h's dtype, the product in the wider one."""
    if vectors is None:
        return h if scale == 1.0 else h * scale
    factor = vectors if scale == 1.0 else vectors * scale
    return (h * per_row(factor, h, axis)).to(h.dtype)


def _taken(vectors: Tensor | None, index: Tensor | None) -> Tensor | None:
    return vectors if vectors is None or index is None else vectors.index_select(0, index)  # (N, n)


def _product(h: Tensor, b: Tensor, axis: int) -> Tensor:
    """``h b^T`` along ``axis``."""
    return F.linear(h, b) if axis == -1 else torch.matmul(b, h.flatten(2)).view(h.shape[0], -1, *h.shape[2:])


def _changed(
    y: Tensor,
    z: Tensor,
    b: Tensor,
    mid: Tensor | None,
    out: Tensor | None,
    scale: float,
    index: Tensor | None,
    axis: int,
) -> Tensor:
    h = _scaled(z, _taken(mid, index), scale, axis)  # (N, ..., r)
    return _added(y, _product(h, b, axis), _taken(out, index), axis, own=True)


def _added(y: Tensor, v: Tensor, out: Tensor | None, axis: int, own: bool) -> Tensor:
    """``y + v * out`` in y's dtype; own: v is nobody else's, and may be written to."""
    if out is not None and v.dtype == out.dtype == y.dtype and not plain():
        vectors = per_row(out, v, axis)
        # One pass over memory; without graph, as out= asks for it.
        return torch.addcmul(y, v, vectors, out=v) if own else torch.addcmul(y, v, vectors)
    return y + _scaled(v, out, 1.0, axis).to(y.dtype)


def _keeps(v: Tensor, b: Tensor) -> bool:
    """Whether h b^T is kept for the backward: on a CPU, whose memory is large and whose products are slow, and where
    the product is no small part of the layer's own (for which r against out is the measure).
    """
    return v.device.type == "cpu" and 4 * b.shape[1] >= b.shape[0]


def _row_sums(one: Tensor, other: Tensor, axis: int) -> Tensor:
    """The sum of ``one * other`` (N, ..., n) over all but rows and features: (N, n), in float32 or wider."""
    wide = accumulate_dtype(one.dtype)
    product = one.to(wide) * other.to(wide)
    if product.ndim == 2:
        return product
    return product.flatten(1, -2).sum(1) if axis == -1 else product.flatten(2).sum(2)


@final
class _Shared(torch.autograd.Function):
    """:func:`lift_shared`; index None: row i is adapter i's."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        b: Tensor,
        mid: Tensor | None,
        out: Tensor | None,
        scale: float,
        index: Tensor | None,
        axis: int,
    ) -> Tensor:
        h = _scaled(z, _taken(mid, index), scale, axis)  # (N, ..., r)
        v = _product(h, b, axis)  # (N, ..., out)
        kept = v if ctx.needs_input_grad[4] and _keeps(v, b) else None
        ctx.save_for_backward(z, b, mid, out, index, kept)
        ctx.scale, ctx.axis = scale, axis
        return no_view(_added(y, v, _taken(out, index), axis, own=kept is None))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, b, mid, out, index, v = ctx.saved_tensors
        scale, axis, needs = ctx.scale, ctx.axis, ctx.needs_input_grad
        own_mid, own_out = _taken(mid, index), _taken(out, index)
        narrow = g.to(z.dtype)
        dz = grad_mid = grad_out = None
        if needs[1] or needs[3]:
            u = _product(_scaled(narrow, own_out, 1.0, axis), b.T, axis)  # (N, ..., r)
            if needs[3]:
                grad_mid = _gathered(_row_sums(u, z, axis) * scale, mid, index)
            if needs[1]:
                dz = _scaled(u, own_mid, scale, axis)
        if needs[4]:
            if v is None or torch.is_grad_enabled():  # with its graph, for a second derivative
                v = _product(_scaled(z, own_mid, scale, axis), b, axis)  # (N, ..., out)
            grad_out = _gathered(_row_sums(narrow, v, axis), out, index)
        return g if needs[0] else None, dz, None, grad_mid, grad_out, None, None, None


def _gathered(rows: Tensor, like: Tensor, index: Tensor | None) -> Tensor:
    """The sums of the rows (N, n) of each adapter: (n adapters, n), in the dtype of ``like``."""
    if index is None:
        return rows.to(like.dtype)
    total = torch.zeros(like.shape, dtype=rows.dtype, device=rows.device)
    return total.index_add_(0, index, rows).to(like.dtype)
