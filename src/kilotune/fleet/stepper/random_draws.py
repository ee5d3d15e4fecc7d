"""What a user's training draws: a function of the user's seed and of where it is, whatever ran before or beside it.

::

    Philox4x64-10, key (seed s, m), 64-bit words x_0, x_1, ...

    m = 7  order     counter (0, 0, 0, 1 + epoch)        rows in the order of their words, equal ones by number
    m = 8  dropout   counter (0, row, step, 1 + layer)   32-bit half w, the low half first, is kept if w >= p * 2^32

The starts of adapters come from torch's generator, seeded for each user, so that they are those of
``torch.manual_seed(seed); get_peft_model(base, config)``. ``row`` is the number of the row in the user's own batch, and
an input's numbers stand in the order (token, feature), so what is padded on the right changes nothing for the others.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...projections.matrices import check_seed
from ...projections.streams import raw_words

__all__ = ["dropped", "order"]

ORDER, DROPOUT = 7, 8


def order(seed: int, epoch: int, count: int) -> list[int]:
    """The numbers 0 ... count - 1 in the order of ``epoch`` (from 0)."""
    found: list[int] = raw_words(seed, ORDER, epoch, 0, count).argsort(kind="stable").tolist()
    return found


def dropped(x: Tensor, seed: int, step: int, layer: int, p: float) -> Tensor:
    """The rows of one user's batch (rows, ...) after dropout: each number is 0 with probability p, else x / (1 - p).

    Args:
        x: of one layer.
        seed: the user's.
        step: the user's own, from 0.
        layer: the layer's number among the adapter's.
        p: the probability, in [0, 1).

    """
    size = x[0].numel()
    least = np.uint32(min(round(p * 2**32), 2**32 - 1))
    kept = np.empty((x.shape[0], size), dtype=bool)
    key = np.array([check_seed(seed), DROPOUT], dtype=np.uint64)
    for row in range(x.shape[0]):
        counter = np.array([0, row, step, 1 + layer], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw((size + 1) // 2)
        kept[row] = words.astype("<u8", copy=False).view("<u4")[:size] >= least
    mask = torch.from_numpy(kept).to(x.device).view(x.shape)
    return x * mask / (1.0 - p)
