"""How rows meet the matrices of several experts: the three forms in which a mixture-of-experts layer multiplies.

==========  ====================================================  =====================================
form        rows x                                                matrices
==========  ====================================================  =====================================
Plain       (..., in), all for one matrix                         (out, in)
Batched     (S, T, in), T rows for each of S matrices             (S, out, in)
Grouped     (S, in), sorted by expert; offs[e] is expert e's end  (E, out, in)
==========  ====================================================  =====================================

In each form a matrix may also be (out, in), and a vector (n,): one for all experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowrank import scale_features

__all__ = ["Batched", "Form", "Grouped", "Plain"]

# Kernels for grouped products want rows of whole 16 bytes; 8 elements are that in every dtype.
ALIGNMENT = 8


class Form(ABC):
    """One way of multiplying rows with the matrices of their experts."""

    @abstractmethod
    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Each row times its expert's matrix^T: (..., in) -> (..., out)."""

    @abstractmethod
    def scale(self, x: Tensor, vector: Tensor | None, factor: float = 1.0) -> Tensor:
        """Each row times its expert's vector, times ``factor``."""

    def low_rank(self, x: Tensor, first: Tensor, second: Tensor, mid: Tensor | None, factor: float) -> Tensor:
        """Each row through its expert's ``factor * second diag(mid) first``: (..., in) -> (..., out)."""
        return self.product(self.scale(self.product(x, first), mid, factor), second)


@final
class Plain(Form):
    """All rows belong to one expert."""

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def scale(self, x: Tensor, vector: Tensor | None, factor: float = 1.0) -> Tensor:
        return scale_features(x, vector, factor)


@final
class Batched(Form):
    """A matrix for each batch of rows."""

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix) if matrix.ndim == 2 else torch.bmm(x, matrix.transpose(1, 2))  # (S, T, out)

    def scale(self, x: Tensor, vector: Tensor | None, factor: float = 1.0) -> Tensor:
        spread = vector.unsqueeze(1) if vector is not None and vector.ndim == 2 else vector  # (S, 1, n)
        return scale_features(x, spread, factor)


@final
class Grouped(Form):
    """Rows sorted by expert.

    Args:
        kernel: (x (S, in), matrices (E, in, out), offs=...) -> (S, out).
        offs: (E,) where each expert's rows end.
        tail: whether there may be rows beyond the last end, which belong to no expert of this process. Kernels
            leave their values, and those of their gradients, undefined; they are kept away from the vectors.

    """

    def __init__(self, kernel: Callable[..., Any], offs: Tensor, tail: bool) -> None:
        self.kernel, self.offs, self.tail = kernel, offs, tail

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        if matrix.ndim == 2:
            return F.linear(x, matrix)
        result: Tensor = self.kernel(x, matrix.transpose(-2, -1), offs=self.offs)
        return result

    def scale(self, x: Tensor, vector: Tensor | None, factor: float = 1.0) -> Tensor:
        if vector is None or vector.ndim == 1:
            return scale_features(x, vector, factor)
        rows = torch.arange(x.shape[0], device=x.device, dtype=self.offs.dtype)  # (S,)
        expert = torch.searchsorted(self.offs, rows, right=True).clamp(max=vector.shape[0] - 1)  # (S,)
        if not self.tail:
            return scale_features(x, vector[expert], factor)
        beyond = (rows >= self.offs[-1]).unsqueeze(-1)  # (S, 1)
        scaled = scale_features(x.masked_fill(beyond, 0.0), vector[expert], factor)
        return scaled.masked_fill(beyond, 0.0)

    def low_rank(self, x: Tensor, first: Tensor, second: Tensor, mid: Tensor | None, factor: float) -> Tensor:
        short = -first.shape[-2] % ALIGNMENT
        if short and (first.ndim == 3 or second.ndim == 3):
            first, second = F.pad(first, (0, 0, 0, short)), F.pad(second, (0, short))
            mid = None if mid is None else F.pad(mid, (0, short))
        return super().low_rank(x, first, second, mid, factor)
