"""Row files, named by their content; and a worker's own copies of rows, which nobody can take away."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Final, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from ..whole_file import replacing
from .layout import Layout

__all__ = ["Spill", "read_row", "row_name", "write_row"]

SUFFIX: Final = ".row.safetensors"
NAME = re.compile(r"[0-9a-f]{64}" + re.escape(SUFFIX))


def _bytes(row: Tensor) -> memoryview:
    return memoryview(row.contiguous().view(torch.uint8).numpy().data)


def row_name(row: Tensor, layout: str) -> str:
    """The file's name: SHA-256 of the layout, the type and the numbers. Other contents never have the same path."""
    digest = hashlib.sha256(f"{layout}\n{row.dtype}\n".encode())
    digest.update(_bytes(row))
    return digest.hexdigest() + SUFFIX


def write_row(folder: Path, row: Tensor, layout: Layout) -> Path:
    """Write a whole row, if it is not there yet; whole or not at all."""
    text = layout.to_json()
    path = folder / row_name(row, text)
    if not path.exists():
        data = save({"row": row}, {"layout": text})
        with replacing(path, shared=True) as fresh:
            fresh.touch(0o600, exist_ok=False)  # an adapter is for its owner only
            fresh.write_bytes(data)
    return path


def read_row(folder: Path, path: str) -> tuple[Tensor, str]:
    """(the row, its layout as JSON) of a file that :func:`write_row` wrote into ``folder``, held against its name.

    Raises:
        CheckpointError: it is not there, damaged, or not a file of this folder.

    """
    file = Path(path)
    if file.parent != folder or not NAME.fullmatch(file.name):
        raise CheckpointError(f"{path!r} is no row of this engine; adapters come from its store, by their names")
    try:
        with safe_open(path, framework="pt") as opened:
            row, layout = opened.get_tensor("row"), str((opened.metadata() or {}).get("layout"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if row.ndim != 1 or row_name(row, layout) != file.name:
        raise CheckpointError(f"{path} is damaged: its content is not what its name says")
    return row, layout


@final
class Spill:
    """Rows of one size, kept by key in a file that has no name any more, so that no one else can remove or cut it.

    What the disk does not take stays in memory.
    """

    def __init__(self, numbers: int, dtype: torch.dtype, folder: str | None = None) -> None:
        self.numbers, self.dtype = numbers, dtype
        self.size = numbers * dtype.itemsize
        self._file = tempfile.TemporaryFile(dir=folder, prefix="kilotune-rows-", buffering=0)  # noqa: SIM115
        self._places: dict[str, int] = {}
        self._memory: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self._places) + len(self._memory)

    def __contains__(self, key: str) -> bool:
        return key in self._places or key in self._memory

    def put(self, key: str, row: Tensor) -> None:
        """Keep a row for good."""
        if key in self:
            return
        place = len(self._places) * self.size
        try:
            self._write(_bytes(row), place)
        except OSError:  # a full disk
            self._memory[key] = row
        else:
            self._places[key] = place

    def get(self, key: str) -> Tensor | None:
        """A row, new at each call, or None where it was never put.

        Raises:
            OSError: the disk fails.

        """
        if key in self._memory:
            return self._memory[key]
        if (place := self._places.get(key)) is None:
            return None
        data = np.empty(self.size, dtype=np.uint8)
        view, done = memoryview(data.data), 0
        while done < self.size:
            count = os.preadv(self._file.fileno(), [view[done:]], place + done)
            if count <= 0:
                raise OSError(f"{self.size} bytes of a row were written, {done} can be read")
            done += count
        return torch.from_numpy(data).view(self.dtype)

    def _write(self, data: memoryview, place: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], place + done)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()
