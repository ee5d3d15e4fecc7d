"""Many low-rank changes with the same factors in one batch: each row of it through the vectors of its own adapter.

::

    x (N, ..., in) ──a──► z (N, ..., r) ──· mid[index]──► ──b──► (N, ..., out) ──· out[index]──► change of y

a and b are one for all (VeRA's projections), so the products are two, whatever the number of adapters; only the vectors
are gathered, n of them for each row. With m_i = ``mid[index_i]``, v_i = ``out[index_i]``, s = ``scale``, h = z * m and
u = (g * v) b, where g = dL/dy and * goes over each row's tokens::

    dL/dz = s u * m        dL/dm_i = s sum_t u_it * z_it        dL/dv_i = s sum_t g_it * (h_it b^T)

and the gradient of an adapter's vector is the sum over its rows. Kept for the backward: z, and nothing of the output's
size; h b^T is made again. Sums run in float32 (float64 for float64), and first within a row, so that the numbers that a
device may add in any order are as few as the rows.

Where the factors are the adapters' own (LoRA's), :func:`lift_own` runs a product for each row.
"""

from __future__ import annotations

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import accumulate_dtype, plain

__all__ = ["lift_own", "lift_shared", "per_row"]


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
    index: Tensor,
    axis: int = -1,
) -> Tensor:
    """``y_i + scale * out[index_i] * (b (mid[index_i] * z_i))`` for each row i, in y's dtype.

    Args:
        y: (N, ..., out), with the features on ``axis``.
        z: (N, ..., r), likewise: the input through the common first factor.
        b: (out, r), in z's dtype, not trained.
        mid: (n, r) or None for ones.
        out: (n, out) or None for ones.
        scale: a scalar.
        index: (N,) int64, each in 0 ... n - 1: which adapter's vectors a row takes.
        axis: -1, or 1 where the axes behind it are places (a convolution's).

    """
    if plain() or not torch.is_grad_enabled():
        return y + _change(z, b, mid, out, scale, index, axis).to(y.dtype)
    result: Tensor = _Shared.apply(y, z, b, mid, out, scale, index, axis)  # type: ignore[no-untyped-call]
    return result


def lift_own(x: Tensor, a: Tensor, b: Tensor, mid: Tensor | None, out: Tensor | None, scale: float) -> Tensor:
    """``scale * out_i * (b_i (mid_i * (a_i x_i)))`` for each row i of x (N, ..., in), as (N, ..., out).

    Args:
        x: (N, ..., in).
        a: (N, r, in), or (r, in) for all rows.
        b: (N, out, r), or (out, r).
        mid: (N, r) or None.
        out: (N, out) or None.
        scale: a scalar.

    """
    rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)  # (N, T, in)
    h = F.linear(rows, a) if a.ndim == 2 else torch.bmm(rows, a.transpose(1, 2))  # (N, T, r)
    h = _scaled(h, mid, scale, -1)
    h = F.linear(h, b) if b.ndim == 2 else torch.bmm(h, b.transpose(1, 2))  # (N, T, out)
    return _scaled(h, out, 1.0, -1).view(*x.shape[:-1], h.shape[-1])


def _scaled(h: Tensor, vectors: Tensor | None, scale: float, axis: int) -> Tensor:
    """``h * vectors * scale`` in h's dtype, the product in the wider one."""
    if vectors is None:
        return h if scale == 1.0 else h * scale
    factor = vectors if scale == 1.0 else vectors * scale
    return (h * per_row(factor, h, axis)).to(h.dtype)


def _taken(vectors: Tensor | None, index: Tensor) -> Tensor | None:
    return None if vectors is None else vectors.index_select(0, index)  # (N, n)


def _product(h: Tensor, b: Tensor, axis: int) -> Tensor:
    """``h b^T`` along ``axis``."""
    return F.linear(h, b) if axis == -1 else torch.matmul(b, h.flatten(2)).view(h.shape[0], -1, *h.shape[2:])


def _change(
    z: Tensor, b: Tensor, mid: Tensor | None, out: Tensor | None, scale: float, index: Tensor, axis: int
) -> Tensor:
    h = _scaled(z, _taken(mid, index), scale, axis)  # (N, ..., r)
    return _scaled(_product(h, b, axis), _taken(out, index), 1.0, axis)  # (N, ..., out)


def _row_sums(product: Tensor, axis: int) -> Tensor:
    """The sum over all but rows and features: (N, ..., n) -> (N, n)."""
    if product.ndim == 2:
        return product
    return product.flatten(1, -2).sum(1) if axis == -1 else product.flatten(2).sum(2)


@final
class _Shared(torch.autograd.Function):
    """The change of :func:`lift_shared`, added to y."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        z: Tensor,
        b: Tensor,
        mid: Tensor | None,
        out: Tensor | None,
        scale: float,
        index: Tensor,
        axis: int,
    ) -> Tensor:
        ctx.save_for_backward(z, b, mid, out, index)
        ctx.scale, ctx.axis = scale, axis
        return y + _change(z, b, mid, out, scale, index, axis).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, b, mid, out, index = ctx.saved_tensors
        scale, axis, needs = ctx.scale, ctx.axis, ctx.needs_input_grad
        wide = accumulate_dtype(z.dtype)
        own_mid, own_out = _taken(mid, index), _taken(out, index)
        narrow = g.to(z.dtype)
        dz = grad_mid = grad_out = None
        if needs[1] or needs[3]:
            u = _product(_scaled(narrow, own_out, 1.0, axis), b.T, axis)  # (N, ..., r)
            if needs[3]:
                grad_mid = _gathered(_row_sums(u.to(wide) * z.to(wide), axis) * scale, mid, index)
            if needs[1]:
                dz = _scaled(u, own_mid, scale, axis)
        if needs[4]:
            v = _product(_scaled(z, own_mid, scale, axis), b, axis)  # (N, ..., out)
            grad_out = _gathered(_row_sums(narrow.to(wide) * v.to(wide), axis), out, index)
        return g if needs[0] else None, dz, None, grad_mid, grad_out, None, None, None


def _gathered(rows: Tensor, like: Tensor, index: Tensor) -> Tensor:
    """The sums of the rows (N, n) of each adapter: (n adapters, n), in the dtype of ``like``."""
    total = torch.zeros(like.shape, dtype=rows.dtype, device=rows.device)
    return total.index_add_(0, index, rows).to(like.dtype)
