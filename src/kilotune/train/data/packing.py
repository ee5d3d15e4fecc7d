"""Several short rows in one sequence, each blind to the others.

Positions begin again at 0 with each row. Where there is no attention mask, transformers reads the bounds from that
and lets no token see another row (``masking_utils.find_packed_sequence_indices``), if the model does not keep its keys:
so a batch says ``use_cache=False``. Not every model and attention does as much: :func:`refuse_leaks` tries it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UnsupportedError, first_line

__all__ = ["pack", "packed_batch", "refuse_leaks"]

IGNORED = -100


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which rows go together: lists of row numbers whose lengths sum to ``size`` at most; each row once.

    Best fit, the longest first: into the fullest sequence that still has room.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[row] > size:
            raise ValueError(f"row {row} has {lengths[row]} tokens, and a sequence {size}")
        at = bisect.bisect_left(room, (lengths[row], -1))
        if at == len(room):
            left, number = size, len(bins)
            bins.append([])
        else:
            left, number = room.pop(at)
        bins[number].append(row)
        bisect.insort(room, (left - lengths[row], number))
    return [sorted(held) for held in bins]


def packed_batch(rows: Sequence[dict[str, Any]], pad: int) -> dict[str, Any]:
    """A batch of packed rows: ``input_ids``, ``labels`` and ``position_ids``, each (rows, longest).

    Padding is a row of its own behind the others, so it needs no attention mask, which would hide the bounds.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    ids = np.full((len(rows), longest), pad, np.int64)
    labels = np.full((len(rows), longest), IGNORED, np.int64)
    positions = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[i, :length], labels[i, :length], positions[i, :length] = (
            row["input_ids"],
            row["labels"],
            row["position_ids"],
        )
        positions[i, length:] = np.arange(longest - length)
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "use_cache": False,
    }


def refuse_leaks(model: nn.Module) -> None:
    """Try whether packed rows see each other in ``model``: three forward passes over 2 rows of 12 tokens.

    Raises:
        UnsupportedError: they do, or the model does not take positions.

    """
    vocabulary = _vocabulary(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, 12), generator=generator)
    other = ids.clone()
    other[:, :5] = (ids[:, :5] + 1 + torch.randint(vocabulary - 1, (2, 5), generator=generator)) % vocabulary
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, 12)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            seen = [_logits(model, tokens, positions)[:, 5:] for tokens in (ids, other)]
            alone = _logits(model, ids[:, 5:], torch.arange(7).expand(2, 7))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedError(
            f"data.packing: {type(model).__name__} does not take packed rows ({first_line(error)}); set it to false"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    scale = alone.std().clamp_min(1e-6)
    apart = max(float((seen[0] - seen[1]).abs().max() / scale), float((seen[0] - alone).abs().max() / scale))
    if not apart < (1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05):  # rounding, in 16 bits
        raise UnsupportedError(
            f"data.packing: in {type(model).__name__} with this attention, packed rows see each other (what stands "
            "before a row changes its logits): set data.packing to false, or model.attention to sdpa"
        )


def _vocabulary(model: Any) -> int:
    """Rows of the model's embedding, which its own tokens are drawn from for the trial."""
    return int(model.get_input_embeddings().weight.shape[0])


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    device = next(model.parameters()).device
    found = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
    logits: Tensor = found.logits
    return logits.float().cpu()
