"""The low-rank product, factored and as a matrix.

::

    x (..., in) ──a──► z (..., r) ──· mid * scale──► h (..., r) ──b──► (..., out) ──· out──► change of y

The vectors are float32 whatever the base's dtype is, and multiply in float32: in bfloat16 a step of
1e-4 on d = 0.1 would be rounded away. Only the two matrix products run in the base's dtype.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["accumulate_dtype", "low_rank_matrix", "no_autocast", "scale_features"]


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast inside: what is kept is not computed in 16 bits because a forward may be."""
    there = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if there else nullcontext()


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
    factor = vector if scale == 1.0 else vector * scale
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
