"""Principal components of data that come in batches (Ross et al. 2008, "Incremental learning for robust visual
tracking"), as ``peft.utils.incremental_pca``.

After rows of mean m and count n with components V (k, features) and singular values S, a batch X of mean b and count c
has the components of the rows S V, X - b and sqrt(n c / (n + c)) (m - b), stacked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self, final

import torch
from torch import Tensor

from ...errors import ConfigError

__all__ = ["IncrementalPCA"]


@final
class IncrementalPCA:
    """Principal components from batches of rows; names and attributes as in scikit-learn.

    Args:
        n_components: how many; None: as many as the first batch allows.
        copy: as in PEFT; what is given stays as it is in any case.
        batch_size: rows that :meth:`fit` takes at once; by default five times the features.
        svd_driver: of ``torch.linalg.svd``, on CUDA.
        lowrank: ``torch.svd_lowrank`` in its place.
        lowrank_q, lowrank_niter, lowrank_seed: its size (twice the components), iterations and seed.

    Attributes:
        components_: (components, features), the largest entry of each positive.
        singular_values_, explained_variance_, explained_variance_ratio_: (components,).
        mean_, var_: (features,).
        noise_variance_: the mean variance of what is left out.
        n_samples_seen_: rows so far.

    Raises:
        ConfigError: more components than features or rows; other features than before.

    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor
    mean_: Tensor
    var_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and lowrank_q is None:
            if n_components is None:
                raise ConfigError("lowrank: needs n_components, or lowrank_q")
            lowrank_q = 2 * n_components
        if lowrank and n_components is not None and lowrank_q is not None and lowrank_q < n_components:
            raise ConfigError(f"lowrank_q: expected at least n_components = {n_components}, got {lowrank_q}")
        self.n_components, self.copy, self.batch_size = n_components, copy, batch_size
        self.svd_driver, self.lowrank, self.lowrank_q = svd_driver, lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        self.n_samples_seen_ = 0

    def fit(self, X: Any) -> Self:
        """Take in rows (n, features), batch after batch."""
        rows = _rows(X)
        size = 5 * rows.shape[1] if self.batch_size is None else self.batch_size
        for part in self.gen_batches(len(rows), int(size), self.n_components or 0):
            self.partial_fit(rows[part])
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> Self:
        """Take in one batch of rows (n, features). check_input: as in PEFT; it is checked in any case."""
        rows = _rows(X)
        count, features = rows.shape
        self._check(count, features)
        seen, total = self.n_samples_seen_, self.n_samples_seen_ + count
        wide = rows.double()
        mean = wide.mean(0)
        spread = (wide - mean).square().sum(0)
        stacked = rows - mean.to(rows.dtype)
        if seen:
            apart = self.mean_ - mean
            between = (seen * count / total) ** 0.5 * apart
            stacked = torch.cat([self.singular_values_[:, None] * self.components_, stacked.double(), between[None]])
            spread = spread + self.var_ * seen + apart.square() * (seen * count / total)
            mean = (self.mean_ * seen + mean * count) / total
        values, vectors = self._svd(stacked.double())
        self.n_samples_seen_, self.mean_, self.var_ = total, mean, spread / total
        k = self.n_components
        variance = values.square() / (total - 1)
        self.components_, self.singular_values_ = vectors[:k], values[:k]
        self.explained_variance_, self.explained_variance_ratio_ = variance[:k], values[:k].square() / spread.sum()
        rest = variance[k:]
        self.noise_variance_ = rest.mean() if len(rest) else torch.zeros((), dtype=variance.dtype, device=rows.device)
        return self

    def transform(self, X: Any) -> Tensor:
        """Rows (n, features) by their components: (n, components)."""
        rows = _rows(X)
        return ((rows - self.mean_) @ self.components_.T).to(rows.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of ``batch_size`` rows of n; the last one is longer where it would leave fewer than the minimum."""
        start = 0
        while start < n:
            end = start + batch_size
            end = n if n - end < max(min_batch_size, 1) else end
            yield slice(start, end)
            start = end

    def _check(self, count: int, features: int) -> None:
        if self.n_components is None:
            self.n_components = min(count, features)
        if self.n_components > features:
            raise ConfigError(f"n_components={self.n_components}: there are {features} features")
        if not self.n_samples_seen_ and self.n_components > count:
            raise ConfigError(f"n_components={self.n_components}: the first batch has {count} rows")
        if self.n_samples_seen_ and features != len(self.mean_):
            raise ConfigError(f"expected {len(self.mean_)} features as before, got {features}")

    def _svd(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Singular values (k,) and right vectors (k, features), the largest entry of each positive."""
        if self.lowrank:
            with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
                if self.lowrank_seed is not None:
                    torch.manual_seed(self.lowrank_seed)
                _, values, columns = torch.svd_lowrank(matrix, q=self.lowrank_q, niter=self.lowrank_niter)
            vectors = columns.mH
        else:
            _, values, vectors = torch.linalg.svd(matrix, full_matrices=False, driver=self.svd_driver)
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        return values, vectors * largest.sign()


def _rows(given: Any) -> Tensor:
    rows = given if isinstance(given, Tensor) else torch.as_tensor(given)
    if rows.ndim != 2:
        raise ConfigError(f"expected rows (n, features), got the shape {tuple(rows.shape)}")
    return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
