"""A frozen linear layer with a low-rank change: as a product of factors, as a matrix, and with a backward of its own.

::

    x (T, in) ──a──► z (T, r) ──· mid * scale──► ──b──► (T, out) ──· out──► change of y = x W^T + bias

**Derivation.** Let v = ``out`` (out,), m = ``mid`` (r,), s = ``scale``, F = s diag(v) b diag(m) of shape (out, r), and
W' = W + F a. Then y = x W^T + z F^T = x W'^T. With g = dL/dy (T, out), and M = g^T z (out, r)::

    dL/dx   = g W + (g F) a = g W'
    dL/dm_k = sum_tj g_tj s v_j b_jk z_tk         so  dL/dm = s colsum(v * b * M)
    dL/dv_j = sum_tk g_tj s b_jk m_k z_tk         so  dL/dv = s rowsum(b * M * m)
    dL/db   = s v * M * m                         dL/da = (g F)^T x

where * broadcasts v down the rows and m along the columns. M = g^T z = (g^T x) a^T, so either z (T, r) or x (T, in) is
kept, never both where the factors are frozen (VeRA), and nothing of size (T, out). Autograd on the composed form keeps
x a^T, its product with m and the output before v, and multiplies T * out numbers where F is folded here in r * out.
:mod:`.ways` says which form of each product is taken; all agree to rounding.

The vectors are float32 whatever the base's dtype is: in bfloat16 a step of 1e-4 on d = 0.1 would be rounded away. F
and W' are computed in float32 (float64 for float64), and rounded once; M is accumulated, and summed, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .ways import Choice

__all__ = [
    "NARROW",
    "Factors",
    "accumulate_dtype",
    "autocast_dtype",
    "lift",
    "linear",
    "low_rank_matrix",
    "needs_z",
    "no_autocast",
    "no_view",
    "plain",
    "scale_features",
    "swallowed",
]

NARROW = (torch.float16, torch.bfloat16)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside: what is kept is not computed in 16 bits because a forward may be."""
    there = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if there else nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which products run under autocast; None where it is off."""
    there = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if there else None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype in which weights are merged."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_features(h: Tensor, vector: Tensor | None, scale: float) -> Tensor:
    """``h * vector * scale``, computed in the wider of both dtypes and returned in ``h``'s.

    Args:
        h: (..., n) or whatever ``vector`` broadcasts against.
        vector: broadcastable to ``h``, or None for ones.
        scale: a scalar.

    """
    if vector is None:
        return h if scale == 1.0 else h * scale
    factor = vector if scale == 1.0 else vector.to(torch.promote_types(h.dtype, vector.dtype)) * scale
    return (h * factor).to(h.dtype)


def low_rank_matrix(
    a: Tensor, b: Tensor, mid: Tensor | None, out: Tensor | None, scale: float, dtype: torch.dtype
) -> Tensor:
    """``scale * diag(out) b diag(mid) a`` as a dense matrix (out, in) in ``dtype``; leading dimensions are carried.

    Args:
        a: (r, in).
        b: (out, r).
        mid: (r,) or None.
        out: (out,) or None.
        scale: a scalar.
        dtype: float32 or float64; everything is widened to it first.

    """
    left = b.to(dtype)  # (out, r)
    if mid is not None:
        left = left * (mid.to(dtype) * scale).unsqueeze(-2)
    elif scale != 1.0:
        left = left * scale
    matrix = left @ a.to(dtype)  # (out, in)
    return matrix if out is None else out.to(dtype).unsqueeze(-1) * matrix


@final
class Factors(NamedTuple):
    """``scale * diag(out) b diag(mid)``, the factor F (out, r) that z is multiplied by.

    b: (out, r). mid: (r,) or None for ones. out: (out,) or None for ones.
    """

    b: Tensor
    mid: Tensor | None
    out: Tensor | None
    scale: float

    def folded(self, dtype: torch.dtype) -> Tensor:
        """F (out, r) in ``dtype``, rounded once."""
        wide = accumulate_dtype(self.b.dtype)
        left = self.b
        if self.mid is not None:
            left = left.to(wide) * (self.mid.to(wide) * self.scale)  # (out, r)
        elif self.scale != 1.0:
            left = left.to(wide) * self.scale
        if self.out is not None:
            own = left is not self.b and not torch.compiler.is_compiling() and not torch.is_grad_enabled()
            rows = self.out.to(wide).unsqueeze(-1)
            left = left.mul_(rows) if own else left.to(wide) * rows  # in place: new memory costs more than the product
        return left.to(dtype)

    def applied(self, z: Tensor) -> Tensor:
        """``z F^T``: (..., r) -> (..., out), with the vectors multiplied into the features, not into b."""
        h = F.linear(scale_features(z, self.mid, self.scale), self.b.to(z.dtype))
        return scale_features(h, self.out, 1.0)

    def merged(self, weight: Tensor, a: Tensor, again: bool = False) -> Tensor:
        """W' = W + F a (out, in) in the weight's dtype, computed in float32 or wider and rounded once.

        again: for the second time. Said to a compiler in other words, or it keeps the first W' until the backward.
        """
        wide = accumulate_dtype(weight.dtype)
        if again and torch.compiler.is_compiling():
            return (self.folded(wide) @ a.to(wide) + weight.to(wide)).to(weight.dtype)
        return torch.addmm(weight.to(wide), self.folded(wide), a.to(wide)).to(weight.dtype)

    def gradients(
        self, statistic: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of b, mid and out from M (out, r), those that are ``wanted``."""
        wide = statistic.dtype
        grad_b = grad_mid = grad_out = None
        mid = None if self.mid is None else self.mid.to(wide)
        out = None if self.out is None else self.out.to(wide)
        if wanted[0]:
            grad_b = Factors(statistic, self.mid, self.out, self.scale).folded(self.b.dtype)
        if wanted[1] or wanted[2]:
            both = self.b.to(wide) * statistic  # (out, r)
            if self.mid is not None and wanted[1]:
                summed = both.sum(0) if out is None else torch.mv(both.T, out)  # (r,)
                grad_mid = (summed * self.scale).to(self.mid.dtype)
            if self.out is not None and wanted[2]:
                summed = both.sum(1) if mid is None else torch.mv(both, mid)  # (out,)
                grad_out = (summed * self.scale).to(self.out.dtype)
        return grad_b, grad_mid, grad_out


# -- the plain forms: what the functions below must equal ----------------------------------------------


# New in torch 2.7.
_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch._C._is_tracing)


def plain() -> bool:
    """Whether gradients are left to autograd: in transforms of torch.func and forward-mode derivatives; and in
    torch.export and torch.jit.trace, whose graphs then serve any number of tokens.
    """
    if torch.compiler.is_compiling():
        return _exporting()
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return transformed or torch._C._is_tracing()


def _few(tokens: int, b: Tensor) -> bool:
    """Whether scaling the features of so few tokens is less work than folding the vectors into b (out, r)."""
    return tokens * (b.shape[0] + b.shape[1]) < b.numel()


def lift(y: Tensor, z: Tensor, factors: Factors, axis: int = -1) -> Tensor:
    """``y + z F^T`` in y's dtype; keeps z and no more.

    Args:
        y: (..., out), with the features on ``axis``.
        z: (..., r), likewise.
        factors: F.
        axis: where the features are, -1 or 1; with 1 the axes behind it are places (a convolution's).

    """
    if plain():
        moved = factors.applied(z if axis == -1 else z.movedim(axis, -1))
        return y + (moved if axis == -1 else moved.movedim(-1, axis)).to(y.dtype)
    own = (factors.b, factors.mid, factors.out)
    if not _differentiates(y, z, *own):
        return _lifted(y, z, factors, axis)
    result: Tensor = _Lift.apply(y, z, *own, factors.scale, axis)  # type: ignore[no-untyped-call]
    return result


def linear(
    x: Tensor,
    weight: Tensor | Callable[[], Tensor],
    bias: Tensor | None,
    a: Tensor,
    factors: Factors,
    choice: Choice,
    z: Tensor | None = None,
) -> Tensor:
    """``x W^T + bias + x a^T F^T`` with each product in the form of ``choice``.

    Args:
        x: (..., in), in the weight's dtype.
        weight: W (out, in), frozen; or what reads it, once in the forward and once in the backward.
        bias: (out,) or None.
        a: (r, in).
        factors: F.
        choice: the forms. Where x's gradient is merged, W' stands for all of x's gradient.
        z: ``x a^T`` (..., r) with its graph, only where a is frozen; several layers may be given the same. None:
            computed here if it is needed.

    """
    if plain():
        y = F.linear(x, weight if isinstance(weight, Tensor) else weight(), bias)
        return y + factors.applied(F.linear(x, a) if z is None else z).to(y.dtype)
    if z is None and not a.requires_grad and needs_z(choice, factors):
        z = F.linear(x, a)  # (..., r); a second derivative goes through its graph
    tensor = weight if isinstance(weight, Tensor) else None
    read = None if isinstance(weight, Tensor) else weight
    own = (a, factors.b, factors.mid, factors.out)
    if not _differentiates(x, z, bias, *own):
        return _product(x, tensor if read is None else read(), bias, a, factors, choice, z)
    result: Tensor = _Linear.apply(x, z, tensor, bias, *own, factors.scale, choice, read)  # type: ignore[no-untyped-call]
    return result


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def needs_z(choice: Choice, factors: Factors) -> bool:
    """Whether :func:`linear` uses z with these forms."""
    if not choice.merged_forward:
        return True
    trained = [t for t in (factors.b, factors.mid, factors.out) if t is not None and t.requires_grad]
    return bool(trained) and torch.is_grad_enabled() and not choice.dense


def swallowed(weight: Tensor, a: Tensor, factors: Factors) -> float:
    """What rounding W' to the weight's dtype takes of the change: the norm of the error over the change's.

    1.0 where there is no change yet. Waits for a GPU.
    """
    wide = accumulate_dtype(weight.dtype)
    with torch.no_grad(), no_autocast(weight.device):
        change = factors.folded(wide) @ a.to(wide)  # (out, in)
        total = weight.to(wide) + change
        norm = float(change.norm())
        return float((total.to(weight.dtype).to(wide) - total).norm()) / norm if norm > 0.0 else 1.0


# -- with a backward of their own ----------------------------------------------------------------------


def _as_given(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast around products whose operands have the dtype that they should have.

    Not in compiled code, where leaving it would end the autocast around it (torch 2.13); there the one product that it
    changes is M's, which is then rounded to 16 bits before it is summed.
    """
    return nullcontext() if torch.compiler.is_compiling() else no_autocast(device)


def _statistic(g: Tensor, z: Tensor, b: Tensor) -> Tensor:
    """M = g^T z (out, r) from (T, out) and (T, r), accumulated in float32, in the memory order of b (out, r)."""
    if g.dtype in NARROW or z.dtype in NARROW:
        g, z = g.float(), z.float()
    product = (z.T @ g).T if b.stride(0) < b.stride(1) else g.T @ z
    return product.to(accumulate_dtype(product.dtype))


def no_view(y: Tensor) -> Tensor:
    """``y`` in the same memory, and no view: into a view that a function of autograd's made, nobody may write.

    Not ``y.data``, which tracers do not follow.
    """
    if not torch.compiler.is_compiling() and not y._is_view():
        return y
    same: Tensor = torch.ops.aten._unsafe_view.default(y, y.shape)
    return same


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _lifted(y: Tensor, z: Tensor, factors: Factors, axis: int) -> Tensor:
    with _as_given(y.device):
        if axis == 1:
            change = torch.matmul(factors.folded(z.dtype), z.flatten(2)).view_as(y)  # (N, out, places)
            return y + change.to(y.dtype)
        tokens = _rows(z)  # (T, r)
        if _few(tokens.shape[0], factors.b) or y.dtype != z.dtype:
            return y + factors.applied(z).to(y.dtype)
        return torch.addmm(_rows(y), tokens, factors.folded(z.dtype).T).view(y.shape)


def _product(
    x: Tensor, w: Tensor | None, bias: Tensor | None, a: Tensor, factors: Factors, choice: Choice, z: Tensor | None
) -> Tensor:
    assert w is not None
    with _as_given(x.device):
        if choice.merged_forward:
            return F.linear(x, factors.merged(w, a), bias)
        y = F.linear(x, w, bias)
        rows, tokens = _rows(y), _rows(F.linear(x, a) if z is None else z)
        if _few(tokens.shape[0], factors.b):
            rows += factors.applied(tokens)  # in place: y is this function's own
        else:
            rows.addmm_(tokens, factors.folded(tokens.dtype).T)
        return y


@final
class _Lift(torch.autograd.Function):
    """y + z F^T, features on the last axis or on axis 1."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, b: Tensor, mid: Tensor | None, out: Tensor | None, scale: float, axis: int
    ) -> Tensor:
        ctx.save_for_backward(z, b, mid, out)
        ctx.scale, ctx.axis = scale, axis
        return no_view(_lifted(y, z, Factors(b, mid, out, scale), axis))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        z, b, mid, out = ctx.saved_tensors
        factors = Factors(b, mid, out, ctx.scale)
        needs = ctx.needs_input_grad
        with _as_given(g.device):
            narrow = g.to(z.dtype)
            if ctx.axis == 1:
                narrow = narrow.flatten(2)  # (N, out, places)
                if needs[1]:
                    dz = torch.matmul(factors.folded(z.dtype).T, narrow).view_as(z)
                rows, tokens = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (narrow, z.flatten(2)))
            else:
                rows, tokens = _rows(narrow), _rows(z)
                if needs[1]:
                    dz = (rows @ factors.folded(z.dtype)).view_as(z)
            found: tuple[Tensor | None, ...] = (None, None, None)
            if any(needs[2:5]):
                found = factors.gradients(_statistic(rows, tokens, b), needs[2:5])
        return g if needs[0] else None, dz if needs[1] else None, *found, None, None


@final
class _Linear(torch.autograd.Function):
    """x W^T + bias + x a^T F^T, in the forms of a :class:`~.ways.Choice`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        mid: Tensor | None,
        out: Tensor | None,
        scale: float,
        choice: Choice,
        read: Callable[[], Tensor] | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        vectors, trained_a = any(needs[5:8]), needs[4]
        own = z
        if own is None and (not choice.merged_forward or (vectors and not choice.dense)):
            with _as_given(x.device):
                own = F.linear(x, a)  # (..., r)
        y = _product(x, weight if read is None else read(), bias, a, Factors(b, mid, out, scale), choice, own)
        keep_x = trained_a or (choice.dense and vectors)
        keep_z = vectors and not choice.dense
        kept = (x if keep_x else None, own if keep_z else None, weight if needs[0] else None)
        ctx.save_for_backward(*kept, a, b, mid, out)
        ctx.scale, ctx.choice, ctx.read, ctx.own_z = scale, choice, read, z is None
        return no_view(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, z, weight, a, b, mid, out = ctx.saved_tensors
        factors = Factors(b, mid, out, ctx.scale)
        choice, needs = ctx.choice, ctx.needs_input_grad
        with _as_given(g.device):
            if ctx.own_z and z is not None and x is not None and torch.is_grad_enabled():
                z = F.linear(x, a)  # with its graph, for a second derivative
            rows = _rows(g)  # (T, out)
            lowered = statistic = grad_a = None
            through_z = not choice.merged_input and (needs[1] or (ctx.own_z and needs[0]))
            if through_z or (needs[4] and not choice.dense):
                lowered = rows @ factors.folded(g.dtype)  # g F (T, r)
            if choice.dense and (any(needs[5:8]) or needs[4]):
                dense = _statistic(rows, _rows(x), a)  # (out, in)
                statistic = dense @ a.to(dense.dtype).T  # (out, r)
                grad_a = (factors.folded(dense.dtype).T @ dense).to(a.dtype) if needs[4] else None
            else:
                if any(needs[5:8]):
                    statistic = _statistic(rows, _rows(z), b)
                if needs[4]:
                    assert lowered is not None
                    grad_a = _statistic(lowered, _rows(x), a).to(a.dtype)
            found = (None, None, None) if statistic is None else factors.gradients(statistic, needs[5:8])
            dx = _input_gradient(ctx, g, lowered, weight, a, factors) if needs[0] else None
            dz = None
            if needs[1] and not choice.merged_input:
                assert lowered is not None
                dz = lowered.view(*g.shape[:-1], lowered.shape[1])
            bias = rows.sum(0) if needs[3] else None
        return dx, dz, None, bias, grad_a, *found, None, None, None


def _input_gradient(
    ctx: Any, g: Tensor, lowered: Tensor | None, weight: Tensor | None, a: Tensor, factors: Factors
) -> Tensor:
    """dL/dx (..., in); the part that goes through z is left to z's own graph where z was given."""
    w, rows = weight if ctx.read is None else ctx.read(), _rows(g)
    assert w is not None
    if ctx.choice.merged_input:
        dx = rows @ factors.merged(w, a, again=True)
    elif ctx.own_z:
        assert lowered is not None
        dx = torch.addmm(rows @ w, lowered, a.to(lowered.dtype))
    else:
        dx = rows @ w
    return dx.view(*g.shape[:-1], w.shape[1])
