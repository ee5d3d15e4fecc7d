"""Factors B A that a low-rank adapter may start with: of what quantising lost, or orthogonal ones.

Those of a weight itself are held for all adapters (methods/_svd.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..projections.matrices import MATRIX_A, unit_rows
from .lowrank import accumulate_dtype, no_autocast

__all__ = ["orthogonal", "principal", "top_svd"]

OVERSAMPLING = 10


def orthogonal(rank: int, out: int, inn: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), neither zero, whose product is zero to float32 rounding.

    The rows of A lie in one half of an orthonormal basis of the r dimensions between the factors, and those of B in the
    other (datta0.github.io/posts/rethink-lora-init). Entries are a tenth of a sum of r / 2 normal ones.

    Args:
        rank: even.
        out, inn: of the layer's matrix.
        device: where the factors shall be; ``meta`` draws nothing.

    """
    if device.type == "meta":
        return torch.empty(rank, inn, device=device), torch.empty(out, rank, device=device)
    basis = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float32)).Q  # (rank, rank)
    first, second = torch.randn(inn, rank // 2), torch.randn(rank // 2, out)
    a = (first.float() @ basis[0::2]).T / 10  # (rank, in)
    b = second.float().T @ basis[1::2] / 10  # (out, rank)
    return a.contiguous().to(device), b.contiguous().to(device)


def principal(weight: Tensor, rank: int, iterations: int = 0) -> tuple[Tensor, Tensor]:
    """LoftQ's start: A (rank, in) = S^(1/2) V^T, B (out, rank) = U S^(1/2) of the largest singular values of U S V^T.

    B A is the nearest matrix of that rank, whatever signs the vectors have. In the width of the weight, or float32.

    Args:
        weight: (out, in).
        rank: at most min(out, in).
        iterations: power iterations of a randomised SVD (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4), which
            begins with the same portable numbers each time; 0: the exact SVD.

    """
    with no_autocast(weight.device):
        u, s, vh = top_svd(weight.to(accumulate_dtype(weight.dtype)), rank, iterations)
    root = s[:rank].sqrt()
    return (root.unsqueeze(-1) * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def top_svd(matrix: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T of a matrix, at least ``rank`` of them; ``iterations`` as for :func:`principal`."""
    if iterations == 0 or rank + OVERSAMPLING >= min(matrix.shape):
        return tuple(torch.linalg.svd(matrix, full_matrices=False))
    first = torch.from_numpy(unit_rows(0, MATRIX_A, rank + OVERSAMPLING, matrix.shape[1])).to(matrix)
    basis = torch.linalg.qr(matrix @ first.T).Q  # (out, rank + 10)
    for _ in range(iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    small, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ small, s, vh
