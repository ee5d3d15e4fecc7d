"""Prepared rows in memory: token numbers lie end to end in one array, four bytes each, and workers share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np
from torch.utils.data import Dataset

__all__ = ["Ragged", "Rows"]


@final
class Ragged:
    """Lists of different lengths, kept as one array. ``ragged[i]`` is an array of one row."""

    def __init__(self, rows: Iterable[Sequence[Any] | np.ndarray[Any, Any]], dtype: Any) -> None:
        parts = [np.asarray(row, dtype=dtype) for row in rows]
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.flat = np.concatenate(parts) if parts else np.zeros(0, dtype)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.flat[self.starts[row] : self.starts[row + 1]]

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Items per row."""
        return np.diff(self.starts)


@final
class Rows(Dataset[dict[str, Any]]):
    """Rows of several named values; ``rows[i]`` is a mapping from name to value."""

    def __init__(self, values: Mapping[str, Ragged | np.ndarray[Any, Any]]) -> None:
        sizes = {len(value) for value in values.values()}
        assert len(sizes) == 1, sizes
        self.values = dict(values)
        self._size = sizes.pop()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: value[row] for name, value in self.values.items()}
