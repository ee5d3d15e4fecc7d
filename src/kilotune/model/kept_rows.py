"""Rows of batches, each known by its own inputs without the padding; and tensors that are kept for them."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, final

import torch
from torch import Tensor

from ..errors import ConfigError, ResourceError

__all__ = ["KeptRows", "Row", "rows_of"]

LABELS = ("labels", "label", "logits_to_keep")  # what of a batch never enters a block
# With one of these a forward gives more than its last blocks do, or goes on from a text of before.
MORE = ("past_key_values", "output_hidden_states", "output_attentions")


@final
@dataclass(frozen=True, eq=False)
class Row:
    """key: tells a row from others. mask: (tokens of the batch,), which are the row's own; None: all."""

    key: bytes
    mask: Tensor | None

    def own(self, hidden: Tensor) -> Tensor:
        """Of (tokens of the batch, ...) those of the row."""
        return hidden if self.mask is None or self.mask.shape != hidden.shape[:1] else hidden[self.mask]

    def padded(self, own: Tensor) -> Tensor:
        """The reverse, with zeros in the padding, which no other token looks at."""
        if self.mask is None or int(self.mask.sum()) != own.shape[0]:
            return own
        made = own.new_zeros(self.mask.shape[0], *own.shape[1:])
        made[self.mask.to(own.device)] = own
        return made


def rows_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], what: str) -> list[Row] | None:
    """The rows of a batch, of which ``what`` is kept; None for a forward that has to run whole."""
    if any(kwargs.get(name) is not None and kwargs[name] is not False for name in MORE):
        return None
    given = {str(i): value for i, value in enumerate(args) if value is not None}
    given |= {name: value for name, value in kwargs.items() if name not in LABELS}
    if not all(isinstance(given[str(i)], Tensor) for i in range(len(args)) if str(i) in given):
        return None
    tensors = {name: value for name, value in sorted(given.items()) if isinstance(value, Tensor) and value.ndim}
    counts = {value.shape[0] for value in tensors.values()}
    if len(counts) != 1:
        return None
    mask = tensors.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        return None
    held = {name: value.detach().cpu() for name, value in tensors.items()}
    own = None if mask is None else mask.bool()
    return [_row(held, None if own is None else own[i], i, what) for i in range(counts.pop())]


def _row(tensors: Mapping[str, Tensor], mask: Tensor | None, i: int, what: str) -> Row:
    told = hashlib.blake2b(what.encode(), digest_size=16)
    here = None if mask is None else mask.cpu()
    if here is not None and here.any():
        begin = int(here.int().argmax())  # positions may count from the padding
        told.update(b"%d" % begin)
    for name, value in tensors.items():
        row = value[i]
        padded = here is not None and row.ndim > 0 and row.shape[0] == here.shape[0]
        row = (row[here] if padded else row).contiguous()
        told.update(f"{name} {row.dtype} {tuple(row.shape)};".encode())
        told.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
    return Row(told.digest(), mask)


@final
class KeptRows:
    """Tensors by key.

    Args:
        megabytes: of all of them, in 10^6 bytes; what does not fit is not kept.
        folder: where a file for them is made when the first comes, without a name, so that it is gone with the process;
            None: they are in memory.
        beneath: where is looked for what is not here; nothing is put there.

    Raises:
        ConfigError: ``megabytes`` is no number from 0 on.

    """

    def __init__(
        self, megabytes: float = 2_000.0, folder: str | Path | None = None, beneath: KeptRows | None = None
    ) -> None:
        if not 0 <= megabytes < float("inf"):
            raise ConfigError(f"megabytes: expected a number >= 0, got {megabytes!r}")
        self.limit, self.used = int(megabytes * 1e6), 0
        self.folder = None if folder is None else Path(folder)
        self._beneath = beneath
        self.places: dict[bytes, Tensor | tuple[int, torch.dtype, torch.Size]] = {}
        self.file: IO[bytes] | None = None

    def _open(self, folder: Path) -> IO[bytes]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with this object
        except OSError as error:
            raise ResourceError(f"last_blocks: cannot make a file in {folder}: {error.strerror}") from error
        weakref.finalize(self, file.close)
        return file

    def clear(self) -> None:
        """Keep nothing."""
        if self.file is not None:
            self.file.close()
        self.file, self.places, self.used = None, {}, 0

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep a copy of a tensor, if there is room.

        Raises:
            ResourceError: the disk takes no more.

        """
        size = value.numel() * value.element_size()
        if key in self.places or self.used + size > self.limit:
            return
        value = value.detach().cpu().contiguous()
        if self.folder is None:
            self.places[key] = value.clone()
        else:
            self.file = self.file or self._open(self.folder)
            try:
                self.file.seek(self.used)
                self.file.write(value.reshape(-1).view(torch.uint8).numpy().tobytes())
            except OSError as error:
                raise ResourceError(
                    f"last_blocks: {self.folder} takes no more bytes ({error.strerror}) after {self.used:,}; make "
                    "room, or keep less"
                ) from error
            self.places[key] = self.used, value.dtype, value.shape
        self.used += size

    def get(self, key: bytes) -> Tensor | None:
        """What was put, on the CPU; or None."""
        place = self.places.get(key)
        if place is None:
            return None if self._beneath is None else self._beneath.get(key)
        if isinstance(place, Tensor):
            return place
        begin, dtype, shape = place
        assert self.file is not None
        self.file.seek(begin)
        return torch.frombuffer(bytearray(self.file.read(shape.numel() * dtype.itemsize)), dtype=dtype).view(shape)
