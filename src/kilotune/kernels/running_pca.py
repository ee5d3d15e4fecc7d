"""The principal components of rows that come in batches (Ross et al. 2008, Incremental Learning for Robust Visual
Tracking, section 3.1): of what came before only the components are kept."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from .lowrank import accumulate_dtype, no_autocast
from .starts import top_svd

__all__ = ["RunningPca"]

EXACT = 256  # up to so many rows or columns the SVD is exact; beyond, of power iterations
ITERATIONS = 4


@final
class RunningPca:
    """The leading ``rank`` components of all rows so far, about their mean.

    Attributes:
        components: (rank, features), orthonormal, the largest entry of each positive; None before the first batch.
        values: (rank,) singular values of the rows about their mean.
        likeness: (rank,) |cosine| of each component and the one before the last batch; None before the second.

    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.components: Tensor | None = None
        self.likeness: Tensor | None = None
        self.values = torch.zeros(0)
        self._count, self._mean, self._scatter = 0, torch.zeros(0), 0.0

    @property
    def ratios(self) -> Tensor:
        """(rank,) how much of the variance each component has."""
        return self.values.square() / max(self._scatter, torch.finfo(self.values.dtype).tiny)

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        """Take ``rows`` (n, features) into account; n is at least the rank."""
        rows = rows.to(accumulate_dtype(rows.dtype))
        n, before = rows.shape[0], self.components
        mean = rows.mean(0)
        rows = rows - mean
        total, parts = self._count + n, [rows]
        self._scatter += float(rows.square().sum(dtype=torch.float64))
        if before is not None:  # as if the rows before were these few, and one for how the means differ
            apart = (self._count * n / total) ** 0.5 * (self._mean - mean)
            self._scatter += float(apart.square().sum(dtype=torch.float64))
            parts = [self.values.unsqueeze(-1) * before, rows, apart.unsqueeze(0)]
            mean = (self._count * self._mean + n * mean) / total
        stacked = torch.cat(parts)
        with no_autocast(rows.device):
            _, values, vh = top_svd(stacked, 2 * self.rank, 0 if min(stacked.shape) <= EXACT else ITERATIONS)
        components = vh[: self.rank]
        signs = components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
        components = components * signs
        if before is not None:
            self.likeness = (components * before).sum(1).abs()
        self.components, self.values = components, values[: self.rank]
        self._count, self._mean = total, mean
