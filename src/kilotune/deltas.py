"""The five deltas: what a method makes of a layer's canonical matrix W (out, in), as plain data.

==============================================  =====================================================
``LowRank(a, b, mid, out, scale)``              W + scale * diag(out) b diag(mid) a
``Full(change, act)``                           W + change, or by how the change acts on an input
``Rescale(inner, rows, cols, scale_bias)``      diag(rows) (W + inner) diag(cols)
``Shift(bias)``                                 bias + delta
``Residual(down, up, activation, source)``      y + up act(down s), s the layer's output or input
==============================================  =====================================================

Each is stated as a *change* relative to what is there: the base, and what adapters before made of it. A delta says what
it needs of a layer; a layer kind says what it offers (:class:`Need`); a pair whose needs are not offered
is refused when the adapter is added.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from .errors import MergeError, UnsupportedError
from .kernels.lowrank import accumulate_dtype, low_rank_matrix

__all__ = ["Delta", "Full", "LowRank", "Need", "Rescale", "Residual", "Role", "Shift"]


@final
class Need(Enum):
    """What a delta needs of a layer."""

    LINEAR = "a linear map whose factors can be run"
    BIAS = "a bias"
    OUTPUT = "a floating-point output"


@final
class Role(Enum):
    """What one of a method's tensors is to the layer's matrix; decides its form in PEFT's files."""

    FIRST = "the first factor (r, in)"
    SECOND = "the second factor (out, r)"
    ROWS = "one number for each row"
    COLS = "one number for each input feature"
    OTHER = "something else"


class Delta(ABC):
    """One layer's change, as plain data.

    ``additive``: the changes of several such deltas in one layer sum, in any order. ``mergeable``: it is a change of
    the weight; several that are not cannot be active in one layer at once.
    """

    needs: ClassVar[frozenset[Need]]
    additive: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True

    @abstractmethod
    def weight_change(self, weight: Tensor) -> Tensor | None:
        """The change of the canonical matrix ``weight`` (out, in), in its dtype; None for no change."""

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        """The change of the bias (out,); None for no change."""
        return None

    def times(self, strength: float | Tensor) -> Delta:
        """The same change, so many times as strong; of one in DoRA what is inside, as its alpha would.

        strength: a number, or a tensor () whose value may change while compiled code stays.

        Raises:
            UnsupportedError: for a change that has no such number.

        """
        raise UnsupportedError(f"a {type(self).__name__} has no strength to be changed; low-rank and dense ones have")


@final
@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """``scale * diag(out) b diag(mid) a`` with a (r, in), b (out, r), mid (r,) and out (out,) or None."""

    a: Tensor
    b: Tensor
    mid: Tensor | None = None
    out: Tensor | None = None
    scale: float = 1.0

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR})

    def weight_change(self, weight: Tensor) -> Tensor:
        return low_rank_matrix(self.a, self.b, self.mid, self.out, self.scale, weight.dtype)

    def times(self, strength: float | Tensor) -> LowRank:
        if isinstance(strength, Tensor):  # into b, which costs out * r and is rounded as a number's product is
            wide = self.b.to(accumulate_dtype(self.b.dtype)) * strength.to(self.b.device)
            return replace(self, b=wide.to(self.b.dtype))
        return replace(self, scale=self.scale * strength)


@final
@dataclass(frozen=True, eq=False)
class Full(Delta):
    """A change (out, in) that is not of low rank, built anew where it is needed.

    Built, it costs out * in numbers a layer while the forward runs; with gradients, until the backward, and its own
    gradient as many again. One that says how it acts (a transform, a circulant matrix) is not built in a forward of
    layers that multiply by their weight and do no more; it is for merging, and in layers of other kinds.

    change: the matrix, or what makes it. act: x (..., in) -> change x (..., out), in the dtype of x.
    """

    change: Tensor | Callable[[], Tensor]
    act: Callable[[Tensor], Tensor] | None = None

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR})

    @property
    def delta(self) -> Tensor:
        """The matrix (out, in)."""
        return self.change if isinstance(self.change, Tensor) else self.change()

    def weight_change(self, weight: Tensor) -> Tensor:
        return self.delta.to(weight.dtype)

    def times(self, strength: float | Tensor) -> Full:
        act = self.act
        return Full(lambda: self.delta * strength, None if act is None else lambda x: act(x) * strength)


@final
@dataclass(frozen=True, eq=False)
class Rescale(Delta):
    """``diag(rows) (W + inner) diag(cols)``; with ``scale_bias`` the rows scale the bias too.

    rows (out,), cols (in,); each may be None for ones, and ``inner`` None for nothing.
    """

    inner: LowRank | Full | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None
    scale_bias: bool = False

    needs: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR})
    additive: ClassVar[bool] = False

    def weight_change(self, weight: Tensor) -> Tensor:
        changed = weight if self.inner is None else weight + self.inner.weight_change(weight)
        if self.rows is not None:
            changed = self.rows.to(weight.dtype).unsqueeze(-1) * changed
        if self.cols is not None:
            changed = changed * self.cols.to(weight.dtype).unsqueeze(-2)
        return changed - weight

    def bias_change(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or self.rows is None or not self.scale_bias:
            return None
        return (self.rows.to(bias.dtype) - 1) * bias

    def times(self, strength: float | Tensor) -> Delta:
        return super().times(strength) if self.inner is None else replace(self, inner=self.inner.times(strength))


@final
@dataclass(frozen=True, eq=False)
class Shift(Delta):
    """A change of the bias (out,)."""

    bias: Tensor

    needs: ClassVar[frozenset[Need]] = frozenset({Need.BIAS})

    def weight_change(self, weight: Tensor) -> None:
        return None

    def bias_change(self, bias: Tensor | None) -> Tensor:
        return self.bias


@final
@dataclass(frozen=True, eq=False)
class Residual(Delta):
    """``y + scale (up act(down s + down_bias) + up_bias)``, down (width, features), up (out, width); never mergeable.

    down_bias (width,) and up_bias (out,) may be None for zeros.
    """

    down: Tensor
    up: Tensor
    activation: Callable[[Tensor], Tensor] = torch.relu
    source: Literal["output", "input"] = "output"
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    scale: float = 1.0

    needs: ClassVar[frozenset[Need]] = frozenset({Need.OUTPUT})
    additive: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False

    def weight_change(self, weight: Tensor) -> Tensor:
        raise MergeError("a bottleneck adapter is not linear, so it cannot be merged into a weight")
