"""Factors B A that a low-rank adapter may start with: of a weight, or orthogonal ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["orthogonal"]


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
