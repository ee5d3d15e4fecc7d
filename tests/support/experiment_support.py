"""Small CIFAR-10 archives of the official layout, for the tests of ``kilotune experiment cnn``."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


def cifar_batches(per_batch: int = 20, seed: int = 0) -> dict[str, Batch]:
    """Random pictures (N, 3072) and labels (N,), every class in turn, per batch."""
    generator = np.random.default_rng(seed)
    labels = (np.arange(per_batch) % 10).astype(np.uint8)
    return {name: (generator.integers(0, 256, (per_batch, 3072), np.uint8), labels) for name in BATCHES}


def binary_batch(batch: Batch) -> bytes:
    """A batch of the binary version: a label byte and 3,072 picture bytes per record."""
    pictures, labels = batch
    return np.concatenate([labels[:, None], pictures], axis=1).tobytes()


def python2_batch(batch: Batch) -> bytes:
    """A batch of the Python version as Python 2 pickled it, instruction by instruction.

    Python 3's pickle cannot write this form: it has no byte strings that are text at the same time.
    """
    pictures, labels = batch
    data, count = pictures.tobytes(), len(labels)

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text  # SHORT_BINSTRING

    number = b"M" + count.to_bytes(2, "little")  # BININT2
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85" + short(b"b") + b"\x87Rq\x09"
    dtype = b"cnumpy\ndtype\nq\x0a" + short(b"u1") + b"K\x00K\x01\x87Rq\x0b"
    dtype += b"(K\x03" + short(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = (
        b"(K\x01" + number + b"M\x00\x0c\x86q\x0c" + dtype + b"\x89T" + len(data).to_bytes(4, "little") + data + b"tb"
    )
    listed = b"]q\x04(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = short(b"batch_label") + b"q\x02" + short(b"a batch") + b"q\x03"
    entries += short(b"labels") + listed + short(b"data") + b"q\x06" + array + state
    names = b"](" + b"".join(short(b"picture.png") for _ in labels) + b"e"
    return b"\x80\x02}q\x01(" + entries + short(b"filenames") + names + b"u."


def tar_gz(path: Path, members: Mapping[str, bytes]) -> Path:
    """A .tar.gz with these members."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def binary_members(batches: Mapping[str, Batch]) -> dict[str, bytes]:
    """The official binary archive's members, its folder, readme and names among them."""
    members = {f"cifar-10-batches-bin/{name}.bin": binary_batch(batch) for name, batch in batches.items()}
    return {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n", **members, "cifar-10-batches-bin/readme.html": b""}


def python_members(batches: Mapping[str, Batch]) -> dict[str, bytes]:
    """The official Python archive's members."""
    members = {f"cifar-10-batches-py/{name}": python2_batch(batch) for name, batch in batches.items()}
    return {"cifar-10-batches-py/batches.meta": b"\x80\x02}q\x01.", **members}
