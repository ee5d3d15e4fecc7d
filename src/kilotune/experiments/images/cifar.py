"""CIFAR-10 from its official archive or from a folder, in its binary or its Python version.

Nothing is ever unpacked to the disk: an archive's members are looked up by name and read into memory, so a
path in an archive cannot point anywhere, and links are ignored. The Python version's pickles are not
unpickled (see :mod:`kilotune.experiments.images.cifar_pickles`).
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from ...bases import cache_folder
from ...errors import KilotuneError, gather
from ...whole_file import replacing
from .cifar_pickles import read_batch
from .digits_data import Data, ImageSet, Progress
from .settings import CIFAR_NAMES

__all__ = ["ARCHIVE_SHA256", "ARCHIVE_URL", "cifar10", "download"]

ARCHIVE_URL: Final = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_SHA256: Final = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
"""Of the binary version's archive, 170,052,171 bytes; its MD5, which the official page prints, is
c32a1d4ab5d03f1284b67883e8d87530."""

RECORD = 1 + 3 * 32 * 32
BATCH_NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
VERSIONS = {"binary": ("cifar-10-batches-bin", ".bin"), "python": ("cifar-10-batches-py", "")}
ARCHIVES = ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz")
LARGEST_BATCH = 64 * 2**20
LARGEST_ARCHIVE = 2**30
CHUNK = 2**20
TIMEOUT_SECONDS = 60.0

Opener = Callable[[], bytes]


def cifar10(place: Path | None = None, progress: Progress | None = None) -> Data:
    """CIFAR-10: 50,000 pictures to train on and 10,000 to test on, in ten classes.

    Args:
        place: an archive, a folder that holds one, or a folder with the batches (or with their folder);
            without it the official archive is used from the cache, and downloaded when it is not there.
        progress: told of the download.

    Raises:
        KilotuneError: nothing is there, a file is missing, cut short or damaged, or the download failed.
    """
    if place is None:
        place = cache_folder() / ARCHIVES[0]
        if not place.exists():
            download(ARCHIVE_URL, ARCHIVE_SHA256, place, progress)
    version, files = _find(place)
    train = _join([_read(version, name, files[name]) for name in BATCH_NAMES[:-1]])
    test = _read(version, BATCH_NAMES[-1], files[BATCH_NAMES[-1]])
    return Data("cifar10", f"CIFAR-10, {version} version", CIFAR_NAMES, train, test)


def download(url: str, sha256: str, target: Path, progress: Progress | None = None) -> None:
    """Fetch ``url`` into ``target``; the file appears only when it is whole and its SHA-256 is right.

    Raises:
        KilotuneError: the server was not reached, or sent something else than expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with replacing(target, shared=True) as part:
            with part.open("wb") as out, urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as reply:
                total, done = int(reply.headers.get("Content-Length") or 0), 0
                while chunk := reply.read(CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(f"downloading {target.name}", done, total)
            if digest.hexdigest() != sha256:
                raise KilotuneError(
                    f"{url} sent {done:,} bytes with SHA-256 {digest.hexdigest()}, but {sha256} was expected;"
                    " try again, or fetch it yourself and name it with --data-dir"
                )
    except (http.client.HTTPException, OSError) as error:  # urllib's errors are OSErrors
        raise KilotuneError(
            f"could not download {url}: {error}; fetch it yourself and name it with --data-dir"
        ) from error


def _find(place: Path) -> tuple[str, Mapping[str, Opener]]:
    """Which version is at ``place``, and how to read each of its six files."""
    if place.is_file():
        return _find_in_archive(place)
    for folder in (place, *(place / name for name, _ in VERSIONS.values())):
        for version, (_, suffix) in VERSIONS.items():
            paths = {name: folder / (name + suffix) for name in BATCH_NAMES}
            if paths[BATCH_NAMES[0]].is_file():
                return version, {name: _file_opener(path) for name, path in paths.items()}
    for name in ARCHIVES:
        if (place / name).is_file():
            return _find_in_archive(place / name)
    raise KilotuneError(
        f"no CIFAR-10 at {place}: expected the folder {' or '.join(n for n, _ in VERSIONS.values())}, or the"
        f" archive {' or '.join(ARCHIVES)}; without --data-dir it is downloaded from {ARCHIVE_URL}"
    )


def _file_opener(path: Path) -> Opener:
    def read() -> bytes:
        if path.stat().st_size > LARGEST_BATCH:
            raise KilotuneError(f"{path} has {path.stat().st_size:,} bytes, too many for a CIFAR-10 batch")
        return path.read_bytes()

    return read


def _find_in_archive(archive: Path) -> tuple[str, Mapping[str, Opener]]:
    """Read the six batches of an archive into memory, in one pass: a .tar.gz cannot be read out of order."""
    contents: dict[tuple[str, str], bytes] = {}
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                _check_extent(member.offset_data + member.size)
                key = _batch_of(member.name)
                if key is None or not member.isfile():
                    continue
                if member.size > LARGEST_BATCH:
                    raise KilotuneError(f"{member.name} has {member.size:,} bytes, too many for a batch")
                file = tar.extractfile(member)
                contents[key] = b"" if file is None else file.read()
            _check_sum(stream)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise KilotuneError(f"{archive} is cut short, damaged or no .tar.gz archive: {error}") from error
    except KilotuneError as error:
        raise KilotuneError(f"{archive}: {error}") from error
    for version in VERSIONS:
        found = {name: contents[version, name] for name in BATCH_NAMES if (version, name) in contents}
        if found:
            return version, {name: _archive_opener(archive, name, found) for name in BATCH_NAMES}
    raise KilotuneError(f"{archive} holds no CIFAR-10 batch such as cifar-10-batches-bin/data_batch_1.bin")


def _check_sum(stream: gzip.GzipFile) -> None:
    """Read on to the end: only there does gzip compare its checksum, and tarfile stops before."""
    while stream.read(CHUNK):
        _check_extent(stream.tell())


def _check_extent(size: int) -> None:
    if size > LARGEST_ARCHIVE:
        raise KilotuneError(f"it unpacks to more than {LARGEST_ARCHIVE:,} bytes, many times CIFAR-10's")


def _archive_opener(archive: Path, name: str, found: Mapping[str, bytes]) -> Opener:
    def read() -> bytes:
        if name not in found:
            raise FileNotFoundError(f"{archive} holds no {name}")
        return found[name]

    return read


def _batch_of(member: str) -> tuple[str, str] | None:
    """(version, batch) of a member at its exact place, such as cifar-10-batches-bin/test_batch.bin."""
    path = PurePosixPath(member)
    for version, (folder, suffix) in VERSIONS.items():
        for name in BATCH_NAMES:
            if path == PurePosixPath(folder, name + suffix):
                return version, name
    return None


def _read(version: str, name: str, opener: Opener) -> ImageSet:
    try:
        content = opener()
    except OSError as error:
        raise KilotuneError(f"CIFAR-10's {name} could not be read: {error}") from error
    pictures, labels = (_parse_binary if version == "binary" else read_batch)(content, name)
    if len(labels) != len(pictures) or len(labels) == 0:
        raise KilotuneError(f"{name} holds {len(pictures)} pictures and {len(labels)} labels")
    if labels.min() < 0 or labels.max() > 9:
        wrong = int(labels[(labels < 0) | (labels > 9)][0])
        raise KilotuneError(f"{name} is damaged: it holds the label {wrong}, and labels are 0 to 9")
    images = torch.from_numpy(pictures.reshape(-1, 3, 32, 32).copy())
    return ImageSet(images, torch.from_numpy(labels))


def _parse_binary(content: bytes, name: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pictures (N, 3072) and labels (N,) of records of a label byte and 3,072 picture bytes each."""
    if len(content) == 0 or len(content) % RECORD:
        raise KilotuneError(
            f"{name} is cut short or damaged: {len(content):,} bytes, which is not a multiple of {RECORD:,}"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _join(batches: list[ImageSet]) -> ImageSet:
    sizes = [len(batch) for batch in batches]
    if len(set(sizes)) > 1:
        faults = [f"{name}: {size:,}" for name, size in zip(BATCH_NAMES, sizes, strict=False)]
        raise KilotuneError(gather("the training batches differ in size, so one is cut short:", faults))
    return ImageSet(torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]))
