"""The fingerprint of a base model from its files, without the model: a few numbers of every tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..fleet.store import Fingerprint

__all__ = ["check_base", "fingerprint_of_files", "folder_of_model"]

MAX_HEADER = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def fingerprint_of_files(model: str) -> Fingerprint:
    """Of a folder with safetensors files, or of a model that is in the hub's cache.

    Raises:
        CheckpointError: it has none.

    """
    folder = folder_of_model(model)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files, so whether an adapter belongs to it cannot be told")
    return Fingerprint.of_tensors({name: value for file in files for name, value in _tensors(file)})


def folder_of_model(model: str) -> Path:
    """The folder itself, or that of a model in the hub's cache.

    Raises:
        CheckpointError: it is neither.

    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model!r} is neither a folder nor in the hub's cache: {error}") from error


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, mapped: only what is looked at is read."""
    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        if size > MAX_HEADER:
            raise CheckpointError(f"{file} is no safetensors file")
        header = json.loads(opened.read(size))
    data = np.memmap(file, np.uint8, "c")  # copy on write: nothing is written, and torch wants it writable
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES:
            continue
        dtype = DTYPES[entry["dtype"]]
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if end - begin != math.prod(entry["shape"]) * dtype.itemsize or end > len(data):
            raise CheckpointError(f"{file} is damaged: {name!r} does not fit into it")
        raw = torch.from_numpy(data[begin:end] if begin % dtype.itemsize == 0 else data[begin:end].copy())
        yield name, raw.view(dtype).view(entry["shape"])


def check_base(adapter: Fingerprint, files: Fingerprint, what: str) -> None:
    """Refuse an adapter of another base. Files leave out tied tensors, and may have buffers, which do not matter.

    Raises:
        CheckpointError: the parameters that differ.

    """
    known = set(files.parameters.values())
    there = {
        name: files.parameters.get(name, entry if entry in known else "") for name, entry in adapter.parameters.items()
    }
    Fingerprint({name: entry for name, entry in there.items() if entry}).check(adapter, what)
