"""Several tensors of one shape made into one: task arithmetic, TIES and DARE.

Sources: task arithmetic, Ilharco et al. 2022 (arXiv 2212.04089); TIES, Yadav et al. 2023 (arXiv 2306.01708); DARE, Yu
et al. 2023 (arXiv 2311.03099).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, check_one_of

__all__ = ["WAYS", "combined", "factors"]

# way -> (how numbers are dropped, whether a sign is elected)
WAYS: dict[str, tuple[str | None, bool]] = {
    "linear": (None, False),
    "magnitude_prune": ("smallest", False),
    "ties": ("smallest", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}


def combined(
    way: str, tensors: Sequence[Tensor], weights: Sequence[float], density: float | None = None, sign: str = "total"
) -> Tensor:
    """The weighted sum of tensors, of which numbers may be dropped, and those of the minority's sign.

    Args:
        way: 'linear'; 'magnitude_prune' and 'ties' keep the largest numbers of each tensor, 'dare_linear' and
            'dare_ties' random ones, scaled to the same expectation. The two with 'ties' keep at each place the numbers
            of the elected sign, and give their mean.
        tensors: of one shape.
        weights: one for each.
        density: the share of numbers that is kept, in (0, 1].
        sign: how the sign is elected: by the 'total' of the numbers, or by the 'frequency' of their signs.

    Raises:
        ConfigError: an unknown way or sign, or a density that is missing or out of range.

    """
    check_one_of("combination_type", way, WAYS)
    check_one_of("majority_sign_method", sign, ["total", "frequency"])
    dropped, elects = WAYS[way]
    if dropped is not None and (density is None or not 0 < density <= 1):
        raise ConfigError(f"density: expected a number in (0, 1] for {way!r}, got {density!r}")
    kept = [tensor if dropped is None or density is None else _kept(tensor, density, dropped) for tensor in tensors]
    stacked = torch.stack(kept)  # (n, ...)
    factors_of = torch.tensor(list(weights), dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * factors_of.reshape(-1, *(1 for _ in stacked.shape[1:]))  # (n, ...)
    if not elects:
        return weighted.sum(dim=0)
    votes = (stacked if sign == "total" else stacked.sign()).sum(dim=0)
    agrees = stacked.sign() == torch.where(votes >= 0, 1, -1)  # (n, ...)
    return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _kept(tensor: Tensor, density: float, how: str) -> Tensor:
    """A tensor with zeros for the numbers that are dropped."""
    if density == 1:
        return tensor
    if how == "random":
        return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density
    flat = tensor.flatten()
    largest = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).reshape(tensor.shape)


def factors(matrix: Tensor, rank: int, clamp: float | None = None) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), whose product is the nearest to a matrix (out, in) that there is of that rank.

    Args:
        matrix: in floats of 32 bits or more.
        rank: at most that of the matrix's shape; where it is more, the rest are zeros.
        clamp: a quantile of all numbers of both, at which they are cut.

    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    own = min(rank, s.numel())
    b, a = u[:, :own] * s[:own], v[:own]
    if clamp is not None:
        high = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        b, a = b.clamp(-high, high), a.clamp(-high, high)
    more = rank - own
    return torch.cat([a, a.new_zeros(more, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], more)], dim=1)
