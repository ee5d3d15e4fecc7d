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
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..candidates import matches_names
from ..config import ALL_LINEAR, FORMAT_VERSION, SECTION, AdapterConfig
from ..deltas import Role
from ..errors import CheckpointError, ConfigError, gather
from ..injection.inject import Installed, Plan, part_of
from ..kinds import LayerKind
from ..layers import stacked_sites as stacks
from ..layers.adapted_parameters import file_names
from ..layers.slot import BIAS
from ..methods import Method, load_method, method_of_file
from ..storage import Storage
from ..storage.sharded import whole_parts
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

__all__ = [
    "CONFIG_NAME",
    "REPO_ID",
    "WEIGHTS_NAME",
    "AdapterFile",
    "Wanted",
    "locate",
    "match_tensors",
    "obtain",
    "parse",
    "read",
    "state_of",
    "tensors_checksum",
    "wanted_of",
    "weights_of",
    "write",
]

PREFIX = "base_model.model."
DOUBLES_UP_TO = (0, 21, 2)  # the last PEFT for which that is known
EXTRA_PREFIX = "base_model."
# In the place of target modules in a file that PEFT is not to read; it names no module.
# PEFT would wrap an out_proj without its attention, which then never calls the wrapper: it gets this instead.
OUT_PROJ_ALONE = "kilotune: out_proj without its attention"
NOT_FOR_PEFT = "kilotune: target_parameters"
# Options that choose among the layers that target_modules names.
SELECTION = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})
OPTIONS = "kilotune_options"  # in the weights' header
# Options that may be edited in a file, for they change no result.
BOOKKEEPING = frozenset({"base_model_name_or_path", "inference_mode", "revision", "task_type"})
# PEFT with bias="all" also writes these copies of a bias that it saves under the module's own key.
REDUNDANT = (".modules_to_save.", ".original_module.")


@final
@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a folder, not yet held against a model.

    tensors: PEFT's keys without prefix (``fc1.vera_lambda_b``); extra: those that belong to no layer.
    section: our part of the config; metadata: the header's, checked. doubled: see :func:`_doubled`.
    """

    folder: Path
    config: AdapterConfig
    method: Method[Any]
    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    section: dict[str, Any]
    metadata: dict[str, str]
    doubled: bool


# -- out -------------------------------------------------------------------------------------------


def state_of(installed: Installed) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """(adapter_config.json, tensors under PEFT's keys, header metadata) of an adapter in a model."""
    sites = {name: layer.site(name) for name, layer in installed.layers.items()}
    slots = installed.slots()
    params = {name: slot.own() for name, slot in slots.items() if slot.method is not None}
    export = stacks.export(installed.method, sites, params, installed.shared)
    tensors = in_file_form(export.tensors, installed, params)
    for name, slot in slots.items():
        if slot.trained_bias is not None:
            tensors[bias_place(name, installed)] = slot.trained_bias
    for name, saved in installed.saved.items():
        twin = saved.copies[installed.key]
        tensors.update({f"{PREFIX}{name}.{key}": value for key, value in twin.state_dict().items()})
    # A clone each: views and tied tensors cannot be written, and what is written must not change meanwhile.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in sorted(tensors.items())}
    config = {**installed.config.to_dict(), **export.config}
    config["fan_in_fan_out"] = any(layer.kind.stores_in_out for layer in installed.layers.values())
    section = _with_parameters(export.section, installed.config, config)
    if section is None and any(_never_called(name, installed) for name in params):
        section = {"target_modules": config["target_modules"]}
        config["target_modules"] = [OUT_PROJ_ALONE]
    if section is not None:
        config[SECTION] = {"format": FORMAT_VERSION, **section}
    elif SELECTION & set(installed.config.ours()) or _taken_otherwise(installed, list(params)):
        # PEFT lacks the key for this method, or would take others: name the layers themselves.
        own = [name for name in params if not part_of(name, installed.layers)]  # it adds the parts by itself
        exact = "|".join(re.escape(name) for name in own)  # a list would match the ends of other names too
        config["target_modules"] = exact
        config.update((key, None) for key in ("layers_to_transform", "layers_pattern") if key in config)
        if any(layer.kind.with_it for layer in installed.layers.values()) and "exclude_modules" in (
            ours := installed.config.ours()
        ):  # the parts of an attention come with it, so leaving one out must stay said
            config[SECTION] = {"format": FORMAT_VERSION, "exclude_modules": ours["exclude_modules"]}
    checksums = tensors_checksum(tensors), config_checksum(config, installed.config.option_names())
    return config, tensors, header_metadata(*checksums, export.checksum, export.header)


def in_file_form(
    tensors: Mapping[str, Tensor], installed: Installed, params: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors under the keys, and in the shapes, that PEFT has for each kind of layer."""
    result = {full_key(key, params): value for key, value in tensors.items()}
    formed: dict[str, Tensor] = {}
    names = _names_in_file(installed)
    for name, own in params.items():
        layer, method = installed.layers[name], installed.method
        for parameter in own:
            key = method.keys[parameter]
            if (value := result.pop(f"{PREFIX}{name}.{key}", None)) is not None:
                role = method.roles.get(parameter, Role.OTHER)
                place = f"{PREFIX}{names[name]}.{layer.kind.file_key(layer.base_layer, key)}"
                formed[place] = layer.kind.to_file(layer.base_layer, role, value)
    return {**result, **formed}


def _names_in_file(installed: Installed) -> dict[str, str]:
    layers = {name: (layer.kind, layer.base_layer) for name, layer in installed.layers.items()}
    return file_names(layers, installed.config)


def bias_place(name: str, installed: Installed) -> str:
    layer, slot = installed.layers[name], installed.slots()[name]
    key = bias_key(slot.method, layer.storage)
    return f"{PREFIX}{_bias_name_in_file(name, layer.kind, _names_in_file(installed))}.{key}"


def _bias_name_in_file(name: str, kind: LayerKind, names: Mapping[str, str]) -> str:
    """The bias of a parameter stands in the module itself, inside all wrappers: the deepest name."""
    if kind.parameter is None or names[name] == name:
        return names[name]
    place = name.rpartition(".")[0]
    return max((n for whole, n in names.items() if whole.rpartition(".")[0] == place), key=len)


def _with_parameters(
    section: dict[str, Any] | None, config: AdapterConfig, values: dict[str, Any]
) -> dict[str, Any] | None:
    """Our section, with the target parameters of a method for which PEFT has no such option.

    PEFT would leave them out without a word: it gets targets that match nothing, so that it refuses the file.
    """
    ours = config.ours()
    if not config.target_parameters or "target_parameters" not in ours:
        return section
    if section is None:
        section = {"target_modules": values["target_modules"]}
        values["target_modules"] = [NOT_FOR_PEFT]
    return {**section, **{key: ours[key] for key in ("exclude_modules", "target_parameters") if key in ours}}


def header_metadata(
    tensors: str, config: str, projections: str | None, options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What the header of adapter_model.safetensors says of ours: up to three checksums (SHA-256, hexadecimal), and
    options that PEFT can do without."""
    metadata = {
        "format": "pt",
        "kilotune_format": str(FORMAT_VERSION),
        "kilotune_config_sha256": config,
        "kilotune_sha256": tensors,
    }
    if options:
        metadata[OPTIONS] = json.dumps(options, sort_keys=True)
    return metadata if projections is None else {**metadata, "kilotune_projections_sha256": projections}


def _header_options(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options of ours in the weights' header."""
    try:
        options = json.loads(metadata.get(OPTIONS, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {OPTIONS} in its header is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise CheckpointError(f"{path}: {OPTIONS} in its header: expected an object, got {options!r}")
    return options


def config_checksum(config: Mapping[str, Any], options: Sequence[str]) -> str:
    """SHA-256 of the values in an adapter_config.json that change results; it ties the config to its weights."""
    decisive = {key: config[key] for key in options if key in config and key not in BOOKKEEPING}
    section = {key: value for key, value in config.get(SECTION, {}).items() if key != "weights"}
    text = json.dumps([decisive, section], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _never_called(name: str, installed: Installed) -> bool:
    layer = installed.layers[name].base_layer
    return isinstance(layer, NonDynamicallyQuantizableLinear) and not part_of(name, installed.layers)


def _taken_otherwise(installed: Installed, layers: Sequence[str]) -> bool:
    """Whether PEFT would take other layers: other blocks, or an attention's out_proj by its name and the attention."""
    config = installed.config
    parts = [name for name in layers if part_of(name, installed.layers)]
    named = config.target_modules == ALL_LINEAR or any(matches_names(config.target_modules, name) for name in parts)
    return bool(parts and named) or _blocks_differ(config, layers)


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


def obtain(
    source: str | os.PathLike[str] | AdapterFile,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> AdapterFile:
    """The adapter in a folder or under a hub id (see :func:`locate`); ``source`` itself where it was read already."""
    options = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
    if not isinstance(source, AdapterFile):
        return read(locate(source, **options, local_files_only=local_files_only))
    if given := [name for name, value in options.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: for a folder or a hub id only; {source.folder} has been read already")
    return source


def read(folder: Path) -> AdapterFile:
    """Read an adapter's files and check what can be checked without a model."""
    whole = read_config(folder / CONFIG_NAME)
    return parse(folder, whole, *read_weights(weights_of(folder, whole)))


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


def parse(
    folder: Path, whole: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> AdapterFile:
    """An adapter of the parts that its two files have, checked as far as can be without a model.

    ``folder``: where they are from, for messages; nothing is read from there.
    """
    values, weights = dict(whole), weights_of(folder, whole)
    section = values.pop(SECTION, {})
    ours = {key: value for key, value in section.items() if key not in ("format", "weights")}
    ours.update(_header_options(weights, metadata))
    try:
        method_cls = method_of_file(str(values.get("peft_type")))
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
    brought = {k: layered.pop(k) for k in list(layered) if k.rpartition(".")[2] in method_cls.file_only}
    extra.update(brought)
    method = load_method(config, extra, metadata.get("kilotune_projections_sha256"))
    doubled = _doubled(whole, metadata)
    return AdapterFile(folder, method.config, method, layered, extra, section, dict(metadata), doubled)


Wanted = Mapping[str, tuple[str, tuple[int, ...]]]
"""The file's key -> (``<layer>.<parameter>``, the shape in the file)."""


def match_tensors(file: AdapterFile, made: Plan, base_name: str, of_layers: Wanted | None = None) -> dict[str, Tensor]:
    """The file's tensors as :func:`..injection.inject.apply` wants them, or one error with all that does not fit.

    of_layers: what :func:`wanted_of` says of ``made``, from who reads many adapters of one plan.
    """
    wanted = dict(wanted_of(made) if of_layers is None else of_layers)
    for name, module in made.saved.items():
        wanted.update({f"{name}.{k}": (f"{name}.{k}", tuple(v.shape)) for k, v in module.state_dict().items()})
    given = {k: v for k, v in file.tensors.items() if not (_redundant(k, made) or _repeats(k, file, made))}
    bases = {key: weight for key in given if (weight := _base_weight(key, made)) is not None}
    tables = {key: _is_base_weight(given[key], weight) for key, weight in bases.items()}
    given = {key: value for key, value in given.items() if key not in tables}
    exact = _exact_buffers(made)
    faults = [f"missing: {key} {shape}" for key, (_, shape) in wanted.items() if key not in given]
    faults += [f"unexpected: {key} {tuple(value.shape)}" for key, value in given.items() if key not in wanted]
    faults += [f"{key}: the file has another base weight than this model" for key, same in tables.items() if not same]
    faults += [
        f"shape of {key}: the model expects {wanted[key][1]}, the file has {tuple(value.shape)}"
        for key, value in given.items()
        if key in wanted and tuple(value.shape) not in (wanted[key][1], _peft_shape(made, wanted[key][0]))
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
    found = {target: _from_file(made, target, given[key]) for key, (target, _) in wanted.items()}
    if file.doubled:
        for target, (name, key) in {target: _split(target) for target in found}.items():
            if part_of(name, made.layers) and made.method.roles.get(key) is Role.SECOND:
                found[target] = 2 * found[target]
    return found


def _split(target: str) -> tuple[str, str]:
    name, _, key = target.rpartition(".")
    return name, key


def _doubled(config: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
    """Whether a PEFT wrote the file that adds the change of an attention's out_proj twice (huggingface/peft#3774).

    With twice the second factor the adapter does here what it did where it was trained.
    """
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(config.get("peft_version", "")))
    version = tuple(int(number or 0) for number in numbers.groups()) if numbers else (0, 0, 0)
    return "kilotune_format" not in metadata and version <= DOUBLES_UP_TO


def wanted_of(made: Plan) -> Wanted:
    """All that the layers of a plan need of a file."""
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    everything = {**made.bias_only, **made.layers}
    names = file_names({name: (cast(LayerKind, c.kind), c.module) for name, c in everything.items()}, made.config)
    for name, shapes in made.shapes.items():
        candidate = made.layers.get(name) or made.bias_only[name]
        kind, storage = cast(LayerKind, candidate.kind), cast(Storage, candidate.storage)
        for key, shape in shapes.items():
            if key == BIAS:
                own = bias_key(made.method if name in made.layers else None, storage)
                wanted[f"{_bias_name_in_file(name, kind, names)}.{own}"] = (f"{name}.{key}", shape)
            elif key not in made.method.rebuilt:
                own = made.method.keys[key]
                role = made.method.roles.get(key, Role.OTHER)
                formed = kind.to_file(candidate.module, role, torch.empty(shape, device="meta"))
                place = f"{names[name]}.{kind.file_key(candidate.module, own)}"
                wanted[place] = (f"{name}.{key}", tuple(formed.shape))
    return wanted


def _from_file(made: Plan, target: str, tensor: Tensor) -> Tensor:
    name, _, key = target.rpartition(".")
    if name not in made.layers or key == BIAS:
        return tensor
    candidate = made.layers[name]
    role = made.method.roles.get(key, Role.OTHER)
    kind = cast(LayerKind, candidate.kind)
    if tuple(tensor.shape) == _peft_shape(made, target):
        try:
            return kind.from_blocks(candidate.module, role, tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{target}: {error}") from None
    return kind.from_file(candidate.module, role, tensor).reshape(made.shapes[name][key])


def _peft_shape(made: Plan, target: str) -> tuple[int, ...] | None:
    """The shape that PEFT gives a tensor for which this layer has another form as well."""
    name, _, key = target.rpartition(".")
    if name not in made.layers or key == BIAS:
        return None
    candidate, role = made.layers[name], made.method.roles.get(key, Role.OTHER)
    return cast(LayerKind, candidate.kind).peft_shape(candidate.module, role, made.shapes[name][key])


def _base_weight(key: str, made: Plan) -> Tensor | None:
    """The base's weight that ``key`` names: PEFT writes an embedding's beside an adapter on "embed_tokens"."""
    name, _, last = key.rpartition(".base_layer.")
    candidate = made.layers.get(name)
    if candidate is None or candidate.storage is None or last != candidate.storage.weight_name:
        return None
    return candidate.storage.read(candidate.module, whole_parts(candidate.storage.keep(candidate.module))).detach()


def _is_base_weight(value: Tensor, weight: Tensor) -> bool:
    if weight.shape != value.shape or weight.device.type == "meta":
        return weight.shape == value.shape
    return torch.equal(weight.cpu().to(value.dtype), value)


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
