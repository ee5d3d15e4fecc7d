"""Batches of rows of different lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from .packing import packed_batch

__all__ = ["IGNORED", "PackedBatch", "PaddedBatch", "StackedBatch"]

IGNORED = -100  # what transformers' losses leave out


@final
@dataclass(frozen=True)
class PaddedBatch:
    """Rows filled up on the right to the longest of the batch, with an ``attention_mask``.

    Attributes:
        fill: what each of the values that are lists is filled up with; ``input_ids`` among them.
    """

    fill: Mapping[str, int]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name in self.fill:
                batch[name] = _filled(values, self.fill[name])
            else:
                batch[name] = torch.as_tensor(np.asarray(values))
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch


def _filled(values: Sequence[Any], fill: int) -> Tensor:
    filled = np.full((len(values), max(map(len, values))), fill, np.int64)
    for row, value in zip(filled, values):
        row[: len(value)] = value
    return torch.from_numpy(filled)


@final
@dataclass(frozen=True)
class PackedBatch:
    """Sequences of several rows each, as :func:`kilotune.train.data.packing.packed_batch` makes them."""

    pad: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        # Rows of a split that is not packed have no positions: they are sequences of one row.
        whole = [{"position_ids": np.arange(len(row["labels"])), **row} for row in rows]
        return packed_batch(whole, self.pad)


@final
@dataclass(frozen=True)
class StackedBatch:
    """Rows of equal shapes: pictures with their classes."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        shapes = sorted({tuple(row["pixel_values"].shape) for row in rows})
        if len(shapes) > 1:
            raise ConfigError(
                f"the image processor makes images of different shapes ({shapes[0]}, {shapes[1]}), which make no "
                "batch: set do_resize, do_center_crop or do_pad in the model's preprocessor_config.json"
            )
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }
