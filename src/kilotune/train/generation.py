"""What a model writes for the rows of a split, so that its text can be scored and not only its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import nn

from .batches import IGNORED

__all__ = ["Generated", "generate_rows"]

Array = np.ndarray[Any, Any]


@final
@dataclass(frozen=True)
class Generated:
    """What was written and what was to be written: (rows, tokens), padded with -100."""

    predictions: Array
    label_ids: Array


def generate_rows(
    model: nn.Module, rows: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], batch_size: int = 8
) -> Generated:
    """Let an encoder and decoder write the targets of all rows: the likeliest token each time.

    Args:
        model: has transformers' ``generate``.
        rows: prepared rows, with ``labels``.
        collate: makes batches of them.
        batch_size: rows at once.

    A target may become a quarter longer than the longest that is wanted, and 8 tokens.
    """
    device = next(model.parameters()).device
    longest = max(len(rows[i]["labels"]) for i in range(len(rows)))
    said: list[list[int]] = []
    meant: list[list[int]] = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                batch = dict(collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))]))
                meant += batch.pop("labels").tolist()
                given = {name: value.to(device) for name, value in batch.items()}
                made: Any = model.generate(  # type: ignore[operator]
                    **given, max_new_tokens=longest + longest // 4 + 8, do_sample=False, num_beams=1
                )
                said += made.tolist()
    finally:
        for module, training in modes:
            module.training = training
    return Generated(_square(said), _square(meant))


def _square(rows: list[list[int]]) -> Array:
    found = np.full((len(rows), max(map(len, rows))), IGNORED, np.int64)
    for row, held in zip(found, rows):
        row[: len(held)] = held
    return found
