"""An adapter's two files on disk: found, read with care, and written whole or not at all. No models here.

Writing goes to a temporary folder beside the target and is then renamed. Reading checks the header before
any library parses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..config import CLOSED, FORMAT_VERSION, SECTION
from ..errors import CheckpointError, MissingExtraError, without_network
from .names import CONFIG_NAME, REPO_ID, WEIGHTS_NAME, adapter_place, refuse_empty
from .own_files import OWN_FILES

__all__ = [
    "CONFIG_NAME",
    "REPO_ID",
    "WEIGHTS_NAME",
    "TwoFiles",
    "fetch_own",
    "locate",
    "not_finite",
    "read_config",
    "read_files",
    "read_weights",
    "sort_metadata",
    "tensors_checksum",
    "weights_of",
    "within",
    "write",
]

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
MAX_CONFIG = 10_000_000
NUMPY = (torch.float32, torch.float64, torch.float16)  # which numpy has, too
SMALL = 65_536  # numbers; so few are looked at together with others


@final
@dataclass(frozen=True, eq=False)
class TwoFiles:
    """What an adapter's two files say, in their own words.

    folder: where they are from, for messages. config: the object of adapter_config.json. tensors: under the file's own
    keys (``base_model.model....``). header: the metadata of adapter_model.safetensors.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        if value.requires_grad or value.device.type != "cpu":
            value = value.detach().cpu()
        value = value.contiguous()
        digest.update(f"{key};{value.dtype};{tuple(value.shape)};".encode())
        plain = value if value.dtype in NUMPY else value.reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()


# -- out -------------------------------------------------------------------------------------------


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    own: Mapping[str, bytes] | None = None,
) -> None:
    """Write the two files of an adapter; on failure the folder is as it was.

    own: what it brings beside them (own_files.py); where an adapter is replaced, the folder has these afterwards, and
    none of the old one's. None: what is there stays.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot write to {folder}: it is a file, expected a folder or nothing")
    made = [parent for parent in folder.parents if not parent.exists()]  # the innermost first
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system as the target, or renaming would not be possible.
        place = folder if folder.is_dir() else folder.parent
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=place) as name:
            fresh = Path(name) / "new"
            fresh.mkdir()
            save_file(dict(tensors), fresh / WEIGHTS_NAME, metadata=dict(metadata))
            sort_metadata(fresh / WEIGHTS_NAME)
            (fresh / CONFIG_NAME).write_text(_config_text(config), encoding="utf-8")
            shutil.copymode(fresh / CONFIG_NAME, fresh / WEIGHTS_NAME)  # safetensors makes files that only we can read
            for file, data in (own or {}).items():
                (fresh / file).write_bytes(data)
            _flush(fresh)
            replaced = own is not None and (folder / CONFIG_NAME).exists()
            _put(fresh, folder, [*(OWN_FILES if replaced else own or ()), WEIGHTS_NAME, CONFIG_NAME])
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise CheckpointError(f"cannot write the adapter to {folder}: {error}") from error


def sort_metadata(path: Path) -> None:
    """Safetensors writes the metadata in random order; sorted, the same adapter gives the same bytes."""
    with path.open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the rest was padding
            file.seek(8)
            file.write(text.ljust(length))


def _config_text(config: Mapping[str, Any]) -> str:
    """A file that PEFT is to read as PEFT writes it; ours on one line, for an adapter may be a few numbers."""
    if str(config.get("peft_type", "")).startswith(CLOSED):
        return json.dumps(config, sort_keys=True, separators=(",", ":")) + "\n"
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _put(fresh: Path, folder: Path, names: Sequence[str]) -> None:
    """Rename the new folder, or its files of these names where the folder is there; those that are not new go.

    Two renames are not one: what is killed between them leaves two files that do not belong together, which the
    config's checksum in the weights' header tells when they are read.
    """
    if not folder.exists():
        try:
            fresh.rename(folder)
            return
        except OSError:
            if not folder.is_dir():  # else another process has written it meanwhile
                raise
    old = fresh.with_name("old")
    old.mkdir()
    for name in names:
        if (folder / name).exists():
            shutil.copy2(folder / name, old / name)
    done: list[str] = []
    try:
        for name in names:
            _move(fresh, folder, name)
            done.append(name)
    except BaseException:
        for name in done:
            _move(old, folder, name)
        raise


def _move(source: Path, folder: Path, name: str) -> None:
    """Have a file as it is in ``source``: not at all, where it is not there."""
    if (source / name).exists():
        os.replace(source / name, folder / name)
    else:
        (folder / name).unlink(missing_ok=True)


# -- in --------------------------------------------------------------------------------------------


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of an adapter: ``source`` itself, or a Hugging Face hub id that is downloaded.

    Raises:
        CheckpointError: no such folder, a subfolder outside of it, or a hub id without an adapter.
        MissingExtraError: a hub id, and huggingface_hub is not installed.

    """
    path = adapter_place(source)
    if path is not None:
        folder = path if subfolder is None else within(path, subfolder, "subfolder")
        refuse_empty(folder, path)
        return folder
    return _download(str(source), revision, subfolder, token, cache_dir, local_files_only)


def _download(
    repo: str,
    revision: str | None,
    subfolder: str | None,
    token: str | None,
    cache_dir: str | None,
    local: bool,
) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError(
            "huggingface_hub", "hub", f"{repo!r} is no folder here; loading it from the hub"
        ) from error
    folder = Path()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            found = hf_hub_download(
                repo,
                name,
                revision=revision,
                subfolder=subfolder,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local,
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise CheckpointError(
                f"{repo!r} is no folder here, and {name} cannot be had from the hub: {without_network(error, repo)}"
            ) from error
        folder = Path(found).parent
    return folder


def fetch_own(source: str | os.PathLike[str], revision: str | None = None) -> None:
    """Have what a hub id brings beside its two files (own_files.py) in the folder that :func:`locate` gave for it.

    Raises:
        CheckpointError: the hub does not give it.

    """
    if adapter_place(source) is not None:
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    for name in OWN_FILES:
        try:
            with contextlib.suppress(EntryNotFoundError):  # most have few of them
                hf_hub_download(str(source), name, revision=revision)
        except (HfHubHTTPError, OSError) as error:
            raise CheckpointError(
                f"{name} of {source!r} cannot be had from the hub: {without_network(error, str(source))}"
            ) from error


def read_files(folder: Path) -> TwoFiles:
    """The two files in ``folder``, each checked by itself.

    Raises:
        CheckpointError: one is not there, damaged, or leads out of the folder.

    """
    config = read_config(folder / CONFIG_NAME)
    tensors, header = read_weights(weights_of(folder, config))
    return TwoFiles(folder, config, tensors, header)


def weights_of(folder: Path, config: Mapping[str, Any]) -> Path:
    """The file that holds the weights, after our part of the config was checked."""
    section = config.get(SECTION, {})
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME}: {SECTION!r}: expected an object, got {section!r}")
    if (version := section.get("format", FORMAT_VERSION)) != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: format {version!r}, but this version reads format {FORMAT_VERSION}; "
            "a newer kilotune is needed"
        )
    return within(folder, str(section.get("weights", WEIGHTS_NAME)), f"{CONFIG_NAME}: weights")


def within(folder: Path, relative: str, what: str) -> Path:
    """``folder / relative``, refused when that lies outside of ``folder``."""
    joined = folder / relative
    if Path(relative).is_absolute() or ".." in Path(relative).parts or "\\" in relative:
        raise CheckpointError(f"{what} {relative!r} names a path outside the adapter's folder {folder}")
    return joined


def read_config(path: Path) -> dict[str, Any]:
    """The object in an adapter_config.json; CheckpointError when it is none."""
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes; a configuration has a few thousand")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of too many digits
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict) or "peft_type" not in values:
        raise CheckpointError(f"{path}: expected an object with the key 'peft_type'")
    return values


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, checked; CheckpointError for any damage."""
    try:
        there = path.is_file()
    except OSError as error:  # a name that no file system takes
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from error
    if not there:
        pickled = path.parent / "adapter_model.bin"
        if pickled.is_file():
            raise CheckpointError(
                f"{pickled} is a pickle, which can run any code when it is loaded, so it is never opened; let the "
                "library that wrote it save it again with safe_serialization=True"
            )
        raise CheckpointError(f"{path} is not there")
    try:
        with path.open("rb") as file:  # opened once: another process may put a new file in its place meanwhile
            metadata = _check_header(path, file)
            file.seek(0)
            tensors = dict(sorted(load(file.read()).items()))
    except KeyError as error:  # safetensors' own table of types
        raise CheckpointError(f"{path} has numbers of the type {error}, which no adapter is kept in") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no valid safetensors file: {error}") from error
    expected = metadata.get("kilotune_sha256")
    if expected is not None and (actual := tensors_checksum(tensors)) != expected:
        raise CheckpointError(f"{path} is damaged: expected SHA-256 {expected} of its tensors, got {actual}")
    return tensors, metadata


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with NaN or infinite values."""
    floats = {key: value for key, value in tensors.items() if value.is_floating_point() and value.device.type != "meta"}
    wide = {key: value if value.element_size() > 1 else value.float() for key, value in floats.items()}
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for value in wide.values():
        if value.numel() < SMALL:
            groups.setdefault((value.dtype, value.device), []).append(value.reshape(-1))
    if all(bool(torch.isfinite(torch.cat(group)).all()) for group in groups.values()):  # as they nearly always are
        wide = {key: value for key, value in wide.items() if value.numel() >= SMALL}
    return [key for key, value in wide.items() if not bool(torch.isfinite(value).all())]


def _check_header(path: Path, file: BinaryIO) -> dict[str, str]:
    """Hold the header's sizes against the file's before anything is parsed; returns the metadata."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes, expected at least 8")
    length = struct.unpack("<Q", start)[0]
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, but the file has {size - 8} after its first 8 (and the "
            f"format allows {MAX_HEADER}): truncated, or no safetensors file"
        )
    raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {key: value for key, value in header.items() if key != "__metadata__"}
        end = max((int(value["data_offsets"][1]) for value in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is no valid safetensors header ({error})") from error
    if end != size - 8 - length:
        raise CheckpointError(
            f"{path}: the header describes {end} bytes of tensors, the file holds {size - 8 - length}: "
            "truncated or damaged"
        )
    metadata = header.get("__metadata__") or {}
    return {str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {}
