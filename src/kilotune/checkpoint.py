"""PEFT's layout out and in: adapter_config.json and adapter_model.safetensors.

::

    folder/                      adapter "default"; others in folder/<name>/
      adapter_config.json        PEFT's keys; a section "kilotune" only where PEFT cannot read the adapter anyway
      adapter_model.safetensors  PEFT's key names; checksums in the header's metadata

Writing goes to a temporary folder beside the target and is then renamed. Reading checks the header before
any library parses it, and reports all missing, unexpected and misshapen tensors at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
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

from .config import FORMAT_VERSION, SECTION, AdapterConfig
from .errors import AdapterError, CheckpointError, ConfigError, MissingExtraError, first_line, gather
from .inject import Installed, Plan
from .layer import BIAS
from .methods import Method, method_by_name

__all__ = ["AdapterFile", "check_adapter_name", "locate", "match_tensors", "read", "state_of", "write"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
EXTRA_PREFIX = "base_model."
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
MAX_CONFIG = 10_000_000
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Options that may be edited in a file, for they change no result.
BOOKKEEPING = frozenset({"base_model_name_or_path", "inference_mode", "revision", "task_type"})
# PEFT with bias="all" also writes these copies of a bias that it saves under the module's own key.
REDUNDANT = (".modules_to_save.", ".original_module.")


@final
@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a folder, not yet held against a model.

    tensors: PEFT's keys without prefix (``fc1.vera_lambda_b``); extra: those that belong to no layer.
    section: our part of the config; metadata: the header's, checked.
    """

    folder: Path
    config: AdapterConfig
    method: Method[Any]
    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    section: dict[str, Any]
    metadata: dict[str, str]


def check_adapter_name(name: object) -> str:
    """Return ``name`` if it can name an adapter and its folder, else raise AdapterError."""
    if not isinstance(name, str) or not name:
        raise AdapterError(f"adapter name: expected a non-empty string, got {name!r}")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise AdapterError(f"adapter name {name!r}: must not be a path, because it names a folder; leave out / and \\")
    if name in (CONFIG_NAME, WEIGHTS_NAME):
        raise AdapterError(f"adapter name {name!r}: an adapter's files are called so; take another name")
    size = len(name.encode(errors="replace"))
    if size > 200 or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise AdapterError(
            f"adapter name {name!r}: at most 200 bytes in UTF-8 (got {size}), no control characters and no surrogates"
        )
    return name


# -- out -------------------------------------------------------------------------------------------


def state_of(installed: Installed) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """(adapter_config.json, tensors under PEFT's keys, header metadata) of an adapter in a model."""
    sites = {name: layer.site(name) for name, layer in installed.layers.items()}
    slots = installed.slots()
    params = {name: slot.own() for name, slot in slots.items() if slot.method is not None}
    export = installed.method.export(sites, params, installed.shared)
    tensors = {full_key(key, params): value for key, value in export.tensors.items()}
    for name, slot in slots.items():
        if slot.trained_bias is not None:
            tensors[f"{PREFIX}{name}.{bias_key(slot.method)}"] = slot.trained_bias
    for name, saved in installed.saved.items():
        twin = saved.copies[installed.key]
        tensors.update({f"{PREFIX}{name}.{key}": value for key, value in twin.state_dict().items()})
    # A clone each: views and tied tensors cannot be written, and what is written must not change meanwhile.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in sorted(tensors.items())}
    config = {**installed.config.to_dict(), **export.config}
    config["fan_in_fan_out"] = any(layer.kind.stores_in_out for layer in installed.layers.values())
    if export.section is not None:
        config[SECTION] = {"format": FORMAT_VERSION, **export.section}
    elif "exclude_modules" in installed.config.ours() or _blocks_differ(installed.config, list(params)):
        # PEFT lacks the key for this method, or would take other blocks: name the layers themselves.
        exact = "|".join(re.escape(name) for name in params)  # a list would match the ends of other names too
        config.update(target_modules=exact, layers_to_transform=None, layers_pattern=None)
    checksums = tensors_checksum(tensors), config_checksum(config, installed.config.option_names())
    return config, tensors, header_metadata(*checksums, export.checksum)


def header_metadata(tensors: str, config: str, projections: str | None) -> dict[str, str]:
    """What the header of adapter_model.safetensors says of ours: up to three checksums (SHA-256, hexadecimal)."""
    metadata = {
        "format": "pt",
        "kilotune_format": str(FORMAT_VERSION),
        "kilotune_config_sha256": config,
        "kilotune_sha256": tensors,
    }
    return metadata if projections is None else {**metadata, "kilotune_projections_sha256": projections}


def config_checksum(config: Mapping[str, Any], options: Sequence[str]) -> str:
    """SHA-256 of the values in an adapter_config.json that change results; it ties the config to its weights."""
    decisive = {key: config[key] for key in options if key in config and key not in BOOKKEEPING}
    section = {key: value for key, value in config.get(SECTION, {}).items() if key != "weights"}
    text = json.dumps([decisive, section], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _blocks_differ(config: AdapterConfig, layers: Sequence[str]) -> bool:
    """Whether PEFT reads layers_to_transform otherwise: not for whole names in the list, nor for blocks at the root."""
    blocks = config.block_indices
    if blocks is None:
        return False
    seen = [re.match(r".*?\.[^.]*\.(\d+)\.", name) for name in layers]
    at_root = config.layers_pattern is None and any(m is None or int(m.group(1)) not in blocks for m in seen)
    return at_root or any(re.search(r"(^|\.)\d+\.", target) for target in config.target_modules or ())


def bias_key(method: Method[Any] | None) -> str:
    return BIAS if method is None else f"base_layer.{BIAS}"


def full_key(key: str, params: Mapping[str, Any]) -> str:
    return PREFIX + key if any(key.startswith(f"{name}.") for name in params) else EXTRA_PREFIX + key


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key};{value.dtype};{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the two files of an adapter; on failure the folder is as it was."""
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
            _sort_metadata(fresh / WEIGHTS_NAME)
            (fresh / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            shutil.copymode(fresh / CONFIG_NAME, fresh / WEIGHTS_NAME)  # safetensors makes files that only we can read
            _flush(fresh)
            _put(fresh, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise CheckpointError(f"cannot write the adapter to {folder}: {error}") from error


def _sort_metadata(path: Path) -> None:
    """Safetensors writes the metadata in random order; sorted, the same adapter gives the same bytes."""
    with path.open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # the rest was padding
            file.seek(8)
            file.write(text.ljust(length))


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _put(fresh: Path, folder: Path) -> None:
    """Rename the new folder, or its two files where the folder is there.

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
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if (folder / name).exists():
            shutil.copy2(folder / name, old / name)
    done: list[str] = []
    try:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(fresh / name, folder / name)
            done.append(name)
    except BaseException:
        for name in done:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            else:
                (folder / name).unlink()
        raise


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
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise CheckpointError(f"expected a folder or a hub id (owner/name), got {source!r}")
    path = Path(source)
    if path.is_dir():
        folder = path if subfolder is None else within(path, subfolder, "subfolder")
        if not (folder / CONFIG_NAME).is_file():
            near = sorted(str(p.parent.relative_to(path)) for p in path.glob(f"*/{CONFIG_NAME}"))
            hint = f" Adapters are in its subfolders: {', '.join(near[:10])}" if near else ""
            raise CheckpointError(f"{folder} holds no {CONFIG_NAME}.{hint}")
        return folder
    beside = path.parent != Path() and path.parent.is_dir()  # a mistyped folder need not be asked for on the hub
    if path.exists() or beside or not REPO_ID.fullmatch(str(source)):
        what = "is a file, not a folder" if path.exists() else "is no folder here, and no hub id (owner/name)"
        what = f"is no folder in {path.parent}" if beside and not path.exists() else what
        raise CheckpointError(f"{str(source)!r} {what}")
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
                f"{repo!r} is no folder here, and {name} cannot be had from the hub: {first_line(error)}"
            ) from error
        folder = Path(found).parent
    return folder


def within(folder: Path, relative: str, what: str) -> Path:
    """``folder / relative``, refused when that lies outside of ``folder``."""
    joined = folder / relative
    if Path(relative).is_absolute() or ".." in Path(relative).parts or "\\" in relative:
        raise CheckpointError(f"{what} {relative!r} names a path outside the adapter's folder {folder}")
    return joined


def read(folder: Path) -> AdapterFile:
    """Read an adapter's files and check what can be checked without a model."""
    whole = _read_config(folder / CONFIG_NAME)
    values = dict(whole)
    section = values.pop(SECTION, {})
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder / CONFIG_NAME}: {SECTION!r}: expected an object, got {section!r}")
    if (version := section.get("format", FORMAT_VERSION)) != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: format {version!r}, but this version reads format {FORMAT_VERSION}; "
            "a newer kilotune is needed"
        )
    weights = within(folder, str(section.get("weights", WEIGHTS_NAME)), f"{CONFIG_NAME}: weights")
    tensors, metadata = _read_weights(weights)
    ours = {key: value for key, value in section.items() if key not in ("format", "weights")}
    try:
        method_cls = method_by_name(str(values.get("peft_type")))
        config = method_cls.config_cls.from_file(values, ours)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG_NAME}: {error}") from error
    expected = metadata.get("kilotune_config_sha256")
    if expected not in (None, config_checksum(whole, config.option_names())):
        raise CheckpointError(
            f"{folder}: {CONFIG_NAME} and {weights.name} do not belong together: one of them was changed, or writing "
            "them was cut off between the two; save the adapter again"
        )
    layered = {k.removeprefix(PREFIX): v for k, v in tensors.items() if k.startswith(PREFIX)}
    rest = {k: v for k, v in tensors.items() if not k.startswith(PREFIX)}
    strange = sorted(k for k in rest if not k.startswith(EXTRA_PREFIX))
    if strange:
        raise CheckpointError(gather(f"{weights}: keys that do not begin with {EXTRA_PREFIX!r}:", strange))
    extra = {k.removeprefix(EXTRA_PREFIX): v for k, v in rest.items()}
    if exact := sorted(k for k, v in rest.items() if not v.is_floating_point()):
        raise CheckpointError(gather(f"{weights}: expected floating-point tensors:", exact))
    method = method_cls.from_checkpoint(config, extra, metadata.get("kilotune_projections_sha256"))
    return AdapterFile(folder, method.config, method, layered, extra, section, metadata)


def _read_config(path: Path) -> dict[str, Any]:
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


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no valid safetensors file: {error}") from error
    expected = metadata.get("kilotune_sha256")
    if expected is not None and (actual := tensors_checksum(tensors)) != expected:
        raise CheckpointError(f"{path} is damaged: expected SHA-256 {expected} of its tensors, got {actual}")
    return tensors, metadata


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


def match_tensors(file: AdapterFile, made: Plan, base_name: str) -> dict[str, Tensor]:
    """The file's tensors as :func:`kilotune.inject.apply` wants them, or one error with all that does not fit."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shapes in made.shapes.items():
        for key, shape in shapes.items():
            method = file.method if name in made.layers else None
            own = bias_key(method) if key == BIAS else file.method.keys[key]
            wanted[f"{name}.{own}"] = (f"{name}.{key}", shape)
    for name, module in made.saved.items():
        wanted.update({f"{name}.{k}": (f"{name}.{k}", tuple(v.shape)) for k, v in module.state_dict().items()})
    given = {k: v for k, v in file.tensors.items() if not (_redundant(k, made) or _repeats(k, file, made))}
    exact = _exact_buffers(made)
    faults = [f"missing: {key} {shape}" for key, (_, shape) in wanted.items() if key not in given]
    faults += [f"unexpected: {key} {tuple(value.shape)}" for key, value in given.items() if key not in wanted]
    faults += [
        f"shape of {key}: the model expects {wanted[key][1]}, the file has {tuple(value.shape)}"
        for key, value in given.items()
        if key in wanted and tuple(value.shape) != wanted[key][1]
    ]
    faults += [
        f"type of {key}: expected a floating-point tensor, the file has {value.dtype}"
        for key, value in given.items()
        if key in wanted and key not in exact and not value.is_floating_point()
    ]
    if faults:
        base = file.config.base_model_name_or_path
        trained = f"; it was trained on {base!r}" if base else ""
        raise CheckpointError(
            gather(f"the adapter in {file.folder} does not fit this {base_name}{trained}:", faults, len(faults))
        )
    return {target: given[key] for key, (target, _) in wanted.items()}


def _exact_buffers(made: Plan) -> set[str]:
    """What modules saved whole keep in other than floats, such as the number of batches that a norm has seen."""
    return {
        f"{name}.{key}"
        for name, module in made.saved.items()
        for key, value in module.state_dict().items()
        if not value.is_floating_point()
    }


def _redundant(key: str, made: Plan) -> bool:
    return any(key.startswith(f"{name}{part}") for name in made.saved for part in REDUNDANT)


def _repeats(key: str, file: AdapterFile, made: Plan) -> bool:
    """Whether ``key`` is a tied bias that the file holds under its layer's name as well, with equal values."""
    module, _, last = key.rpartition(".")
    if last != BIAS or module not in made.tied:
        return False
    others = [file.tensors.get(f"{made.tied[module]}.{end}") for end in (BIAS, f"base_layer.{BIAS}")]
    return any(other is not None and torch.equal(other, file.tensors[key]) for other in others)
