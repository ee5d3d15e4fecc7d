"""PEFT's layout out and in: adapter_config.json and adapter_model.safetensors.

::

    folder/                      adapter "default"; others in folder/<name>/
      adapter_config.json        PEFT's keys; a section "kilotune" only where PEFT cannot read the adapter anyway
      adapter_model.safetensors  PEFT's key names; checksums in the header's metadata

Writing goes to a temporary folder beside the target and is then renamed. Reading checks the header before
any library parses it, and reports all missing, unexpected and misshapen tensors at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from .config import FORMAT_VERSION, SECTION, AdapterConfig
from .deltas import Role
from .errors import AdapterError, CheckpointError, ConfigError, gather
from .files import (
    CONFIG_NAME,
    REPO_ID,
    WEIGHTS_NAME,
    locate,
    read_config,
    read_weights,
    tensors_checksum,
    within,
    write,
)
from .inject import Installed, Plan
from .kinds import LayerKind
from .methods import Method, method_by_name
from .slots import BIAS
from .storage import Storage

__all__ = [
    "CONFIG_NAME",
    "REPO_ID",
    "WEIGHTS_NAME",
    "AdapterFile",
    "check_adapter_name",
    "locate",
    "match_tensors",
    "read",
    "state_of",
    "tensors_checksum",
    "write",
]

PREFIX = "base_model.model."
EXTRA_PREFIX = "base_model."
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
    tensors = {full_key(key, params): value for key, value in _in_file_form(export.tensors, installed, params).items()}
    for name, slot in slots.items():
        if slot.trained_bias is not None:
            tensors[f"{PREFIX}{name}.{bias_key(slot.method, installed.layers[name].storage)}"] = slot.trained_bias
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


def _in_file_form(
    tensors: Mapping[str, Tensor], installed: Installed, params: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors under the keys, and in the shapes, that PEFT has for each kind of layer."""
    result = dict(tensors)
    for name, own in params.items():
        layer, method = installed.layers[name], installed.method
        for parameter in own:
            key = method.keys[parameter]
            if (value := result.pop(f"{name}.{key}", None)) is not None:
                role = method.roles.get(parameter, Role.OTHER)
                formed = layer.kind.to_file(layer.base_layer, role, value)
                result[f"{name}.{layer.kind.file_keys.get(key, key)}"] = formed
    return result


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


def bias_key(method: Method[Any] | None, storage: Storage) -> str:
    return storage.bias_name if method is None else f"base_layer.{storage.bias_name}"


def full_key(key: str, params: Mapping[str, Any]) -> str:
    return PREFIX + key if any(key.startswith(f"{name}.") for name in params) else EXTRA_PREFIX + key


# -- in --------------------------------------------------------------------------------------------


def read(folder: Path) -> AdapterFile:
    """Read an adapter's files and check what can be checked without a model."""
    whole = read_config(folder / CONFIG_NAME)
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
    tensors, metadata = read_weights(weights)
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


def match_tensors(file: AdapterFile, made: Plan, base_name: str) -> dict[str, Tensor]:
    """The file's tensors as :func:`kilotune.inject.apply` wants them, or one error with all that does not fit."""
    wanted = _wanted(made)
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
    return {target: _from_file(made, target, given[key]) for key, (target, _) in wanted.items()}


def _wanted(made: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file's key -> (``<layer>.<parameter>``, the shape in the file) for all that the layers need of a file."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shapes in made.shapes.items():
        candidate = made.layers.get(name) or made.bias_only[name]
        kind, storage = cast(LayerKind, candidate.kind), cast(Storage, candidate.storage)
        for key, shape in shapes.items():
            if key == BIAS:
                own = bias_key(made.method if name in made.layers else None, storage)
                wanted[f"{name}.{own}"] = (f"{name}.{key}", shape)
            elif key not in made.method.rebuilt:
                own = made.method.keys[key]
                role = made.method.roles.get(key, Role.OTHER)
                formed = kind.to_file(candidate.module, role, torch.empty(shape, device="meta"))
                wanted[f"{name}.{kind.file_keys.get(own, own)}"] = (f"{name}.{key}", tuple(formed.shape))
    return wanted


def _from_file(made: Plan, target: str, tensor: Tensor) -> Tensor:
    name, _, key = target.rpartition(".")
    if name not in made.layers or key == BIAS:
        return tensor
    candidate = made.layers[name]
    return cast(LayerKind, candidate.kind).from_file(candidate.module, made.method.roles.get(key, Role.OTHER), tensor)


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
