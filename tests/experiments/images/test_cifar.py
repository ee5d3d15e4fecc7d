"""CIFAR-10 from archives and folders of the official layout, whole, damaged and hostile."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from kilotune.errors import KilotuneError
from kilotune.experiments.images import cifar
from kilotune.experiments.images.cifar import ARCHIVE_URL, cifar10, download
from kilotune.experiments.images.cifar_pickles import read_batch
from kilotune.experiments.images.digits_data import Data
from tests.support.experiment_support import (
    BATCHES,
    Batch,
    binary_batch,
    binary_members,
    cifar_batches,
    python_members,
    tar_gz,
)


@pytest.fixture(scope="module")
def batches() -> dict[str, Batch]:
    return cifar_batches()


def check(data: Data, batches: dict[str, Batch]) -> None:
    """The pictures and labels are those of the batches, in their order."""
    pictures = np.concatenate([batches[name][0] for name in BATCHES[:-1]])
    labels = np.concatenate([batches[name][1] for name in BATCHES[:-1]])
    assert data.train.images.dtype == torch.uint8
    assert np.array_equal(data.train.images.numpy(), pictures.reshape(-1, 3, 32, 32))
    assert np.array_equal(data.train.labels.numpy(), labels)
    assert data.train.labels.dtype == torch.int64
    assert np.array_equal(data.test.images.numpy(), batches["test_batch"][0].reshape(-1, 3, 32, 32))
    assert data.class_names[3] == "cat"


def write(folder: Path, members: dict[str, bytes]) -> Path:
    for name, content in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize("version", ["binary", "python"])
def test_every_way_to_name_the_data(tmp_path: Path, batches: dict[str, Batch], version: str) -> None:
    members = binary_members(batches) if version == "binary" else python_members(batches)
    folder = write(tmp_path / "unpacked", members)
    archive = tar_gz(tmp_path / f"cifar-10-{version}.tar.gz", members)
    inner = "cifar-10-batches-bin" if version == "binary" else "cifar-10-batches-py"
    for place in (folder, folder / inner, archive, tmp_path):
        data = cifar10(place)
        check(data, batches)
        assert version in data.source


def test_pickles_that_python_3_wrote_are_read_too(batches: dict[str, Batch]) -> None:
    pictures, labels = batches["test_batch"]
    for protocol in (2, 3, 4):
        content = pickle.dumps({b"data": pictures, b"labels": labels.tolist()}, protocol=protocol)
        read_pictures, read_labels = read_batch(content, "a batch")
        assert np.array_equal(read_pictures, pictures)
        assert np.array_equal(read_labels, labels)


class Trap:
    """Pickles to a program that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, batches: dict[str, Batch]) -> None:
    trap = tmp_path / "sprung"
    content = pickle.dumps({b"data": Trap(trap), b"labels": [1]}, protocol=2)
    members = {**python_members(batches), "cifar-10-batches-py/data_batch_1": content}
    with pytest.raises(KilotuneError, match=r"data_batch_1 is not a batch .* asks for 'posix.system'"):
        cifar10(write(tmp_path, members))
    assert not trap.exists()
    pickle.loads(content)  # noqa: S301 -- shows that the trap is a real one
    assert trap.exists()


LABELS = [0] * 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a batch"),
        (b"no pickle at all", "not a batch"),
        (pickle.dumps([1, 2], protocol=2), "has no attribute 'items'"),
        (pickle.dumps({b"labels": [1]}, protocol=2), "KeyError"),
        (pickle.dumps({b"data": b"xx", b"labels": [1]}, protocol=2), "'data' is not an array"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": LABELS}, protocol=2), "does not hold 8-bit numbers"),
        (pickle.dumps({b"data": np.zeros((3072, 2), np.uint8).T, b"labels": LABELS}, protocol=2), "not .* row by row"),
        (pickle.dumps({b"data": np.zeros((2, 9), np.uint8), b"labels": LABELS}, protocol=2), r"has shape \(2, 9\)"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": ["a", "b"]}, protocol=2), "list of numbers"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [[1], [2]]}, protocol=2), "list of numbers"),
        (pickle.dumps({b"data": {1, 2}, b"labels": LABELS}, protocol=4), "uses the instruction EMPTY_SET"),
        (b"\x80\x02e.", "not a batch"),
        (b"\x80\x02h\x05.", "not a batch"),
        (b"\x80\x02\x86.", "nothing left on the stack"),
    ],
)
def test_other_pickles_are_one_clear_error(content: bytes, reason: str) -> None:
    with pytest.raises(KilotuneError, match=reason) as caught:
        read_batch(content, "data_batch_1")
    assert "data_batch_1 is not a batch of CIFAR-10's Python version" in str(caught.value)


def test_pickles_cut_short_anywhere_are_errors() -> None:
    content = python_members(cifar_batches(2))["cifar-10-batches-py/test_batch"]
    for length in [*range(0, 200, 3), len(content) // 2, len(content) - 1]:
        with pytest.raises(KilotuneError, match="not a batch of CIFAR-10's Python version"):
            read_batch(content[:length], "test_batch")


def test_an_archive_cut_short_anywhere_is_an_error(tmp_path: Path, batches: dict[str, Batch]) -> None:
    whole = tar_gz(tmp_path / "whole.tar.gz", binary_members(batches)).read_bytes()
    for share in (0.0, 0.001, 0.3, 0.7, 0.999):
        part = tmp_path / "part.tar.gz"
        part.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(KilotuneError, match=r"part.tar.gz (is cut short|holds no)|holds no"):
            cifar10(part)


@pytest.mark.parametrize("length", [1, 2000])
def test_a_damaged_archive_is_an_error(tmp_path: Path, batches: dict[str, Batch], length: int) -> None:
    content = bytearray(tar_gz(tmp_path / "a.tar.gz", binary_members(batches)).read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + length):
        content[place] ^= 0x55
    (tmp_path / "a.tar.gz").write_bytes(content)
    with pytest.raises(KilotuneError, match=r"a.tar.gz is cut short, damaged or no .tar.gz archive"):
        cifar10(tmp_path / "a.tar.gz")


def test_an_archive_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, batches: dict[str, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_gz(tmp_path / "a.tar.gz", {**binary_members(batches), "zeros": bytes(2**23)})
    monkeypatch.setattr(cifar, "LARGEST_ARCHIVE", 2**22)
    with pytest.raises(KilotuneError, match="unpacks to more than 4,194,304 bytes"):
        cifar10(archive)


def test_an_archive_of_something_else_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KilotuneError, match=r"holds no CIFAR-10 batch such as cifar-10-batches-bin/data_batch_1.bin"):
        cifar10(tar_gz(tmp_path / "x.tar.gz", {"readme": b"hello"}))


def test_an_archive_cannot_reach_out_of_itself(tmp_path: Path, batches: dict[str, Batch]) -> None:
    members = binary_members(batches)
    outside = {"../outside": b"x", "/outside": b"x", "../../cifar-10-batches-bin/test_batch.bin": b"x"}
    archive = tar_gz(tmp_path / "a.tar.gz", {**members, **outside})
    before = sorted(tmp_path.parent.rglob("*"))
    check(cifar10(archive), batches)
    assert sorted(tmp_path.parent.rglob("*")) == before, "something was unpacked"


def test_links_in_an_archive_are_not_followed(tmp_path: Path, batches: dict[str, Batch]) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(binary_batch(batches["test_batch"]))
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in binary_members(batches).items():
            info = tarfile.TarInfo(name)
            if name.endswith("test_batch.bin"):
                info.type, info.linkname = tarfile.SYMTYPE, str(secret)
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with pytest.raises(KilotuneError, match=r"holds no test_batch"):
        cifar10(archive)


def test_an_oversized_batch_is_refused_before_it_is_read(
    tmp_path: Path, batches: dict[str, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar, "LARGEST_BATCH", 1000)
    members = binary_members(batches)
    with pytest.raises(KilotuneError, match="too many for a batch"):
        cifar10(tar_gz(tmp_path / "a.tar.gz", members))
    with pytest.raises(KilotuneError, match="too many for a CIFAR-10 batch"):
        cifar10(write(tmp_path / "folder", members))


@pytest.mark.parametrize(
    ("batch", "change", "reason"),
    [
        ("data_batch_2", lambda b: b[:-1], "data_batch_2 is cut short or damaged: 61,459 bytes"),
        ("data_batch_2", lambda b: b"", "data_batch_2 is cut short"),
        ("data_batch_2", lambda b: b[:-3073], "the training batches differ in size"),
        ("test_batch", lambda b: b"\x0b" + b[1:], "test_batch is damaged: it holds the label 11"),
    ],
)
def test_damaged_batches_are_named(
    tmp_path: Path, batches: dict[str, Batch], batch: str, change: object, reason: str
) -> None:
    assert callable(change)
    members = binary_members(batches)
    name = f"cifar-10-batches-bin/{batch}.bin"
    with pytest.raises(KilotuneError, match=reason):
        cifar10(write(tmp_path, {**members, name: change(members[name])}))


def test_a_missing_batch_is_named(tmp_path: Path, batches: dict[str, Batch]) -> None:
    folder = write(tmp_path, binary_members(batches))
    (folder / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(KilotuneError, match="data_batch_4 could not be read"):
        cifar10(folder)


def test_a_folder_without_it_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(KilotuneError, match=r"no CIFAR-10 at .*cifar-10-batches-bin or .*downloaded from https"):
        cifar10(tmp_path)


# -- the download ----------------------------------------------------------------------------------


def test_a_download_is_checked_kept_and_used_again(
    tmp_path: Path, batches: dict[str, Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tar_gz(tmp_path / "official.tar.gz", binary_members(batches))
    monkeypatch.setattr(cifar, "ARCHIVE_URL", archive.as_uri())
    monkeypatch.setattr(cifar, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told: list[tuple[str, int, int]] = []
    check(cifar10(progress=lambda *args: told.append(args)), batches)
    size = archive.stat().st_size
    assert told[-1] == ("downloading cifar-10-binary.tar.gz", size, size)
    archive.unlink()
    check(cifar10(), batches)  # from the cache
    assert [p.name for p in (tmp_path / "cache" / "kilotune").iterdir()] == ["cifar-10-binary.tar.gz"]


def test_a_wrong_download_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"something else")
    target = tmp_path / "cache" / "a.tar.gz"
    with pytest.raises(KilotuneError, match=r"sent 14 bytes with SHA-256 .* was expected; try again"):
        download(source.as_uri(), "0" * 64, target)
    assert list(target.parent.iterdir()) == []


def test_a_failed_or_interrupted_download_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "a.tar.gz"
    with pytest.raises(KilotuneError, match=r"could not download .*--data-dir"):
        download((tmp_path / "absent").as_uri(), "0" * 64, target)
    assert list(target.parent.iterdir()) == []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "source").write_bytes(b"abc")
    with pytest.raises(KeyboardInterrupt):
        download((tmp_path / "source").as_uri(), "0" * 64, target, interrupt)
    assert list(target.parent.iterdir()) == []


def test_the_official_address_is_the_default() -> None:
    assert ARCHIVE_URL.endswith("/cifar-10-binary.tar.gz")
    assert len(cifar.ARCHIVE_SHA256) == 64
