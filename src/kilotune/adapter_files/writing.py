"""Adapters of a model to disk: what an adapter is in PEFT's layout, and its two files written, whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..candidates import matches_names
from ..config import ALL_LINEAR, CLOSED, FORMAT_VERSION, SECTION, AdapterConfig
from ..deltas import Role
from ..errors import AdapterError, ConfigError
from ..injection.inject import Installed
from ..injection.installed_adapter import MODEL
from ..injection.option_checks import part_of
from ..layers import stacked_sites as stacks
from ..layers.adapted_parameters import file_names
from ..layers.slot import BIAS
from ..patterns import matching
from ..storage.sharded import gathered, is_sharded
from .files import tensors_checksum, write
from .peft_layout import (
    FACTORS,
    PREFIX,
    PROJECTIONS,
    SELECTION,
    bias_key,
    bias_name_in_file,
    config_checksum,
    full_key,
    header_metadata,
)

__all__ = ["DEFAULT", "bias_place", "check_safe", "folders", "in_file_form", "save", "state_of"]

DEFAULT = "default"  # the name of an adapter that was given none


def folders(root: Path, adapters: Mapping[str, Installed]) -> dict[Path, Installed]:
    """Where adapters go below ``root``, as in PEFT: 'default' into the folder itself, others into their own.

    Raises:
        AdapterError: there are none.

    """
    if not adapters:
        raise AdapterError("save_pretrained: there is no adapter to save")
    return {root if name == DEFAULT else root / name: installed for name, installed in adapters.items()}


def check_safe(safe_serialization: bool) -> None:
    """Refuse pickles, which PEFT's option of that name would ask for."""
    if safe_serialization is not True:
        raise ConfigError(
            f"safe_serialization: expected True, got {safe_serialization!r}; weights are safetensors only"
        )


def save(
    adapters: Mapping[Path, Installed], is_main_process: bool = True, values: Mapping[int, Tensor] | None = None
) -> None:
    """Write adapters, each into its folder.

    Args:
        adapters: by folder.
        is_main_process: False writes nothing, and only takes part in gathering what is sharded.
        values: of parameters that are gathered already, by ``id`` (see :func:`kilotune.storage.sharded.gathered`).

    """
    modules = [module for installed in adapters.values() for module in installed.modules()]
    if not (is_main_process or any(is_sharded(p) for module in modules for p in module.parameters(recurse=False))):
        return
    with gathered(modules, values):
        states = {folder: state_of(installed) for folder, installed in adapters.items()}  # all, before any is written
    for folder, state in states.items() if is_main_process else ():
        write(folder, *state)


def state_of(
    installed: Installed, values: Mapping[str, Mapping[str, Tensor]] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """(adapter_config.json, tensors under PEFT's keys, header metadata) of an adapter in a model.

    values: its parameters by layer, on the CPU, where its slots do not hold them, and under MODEL those of the whole
    model where these are others too; they are taken as they are.
    """
    sites = {name: layer.site(name) for name, layer in installed.layers.items()}
    slots = installed.slots()
    given = {id(value) for each in (values or {}).values() for value in each.values()}
    shared = installed.shared.holding(values[MODEL]) if values is not None and MODEL in values else installed.shared
    values = {name: slot.values() for name, slot in slots.items()} if values is None else values
    params = {
        name: {key: value for key, value in values[name].items() if key != BIAS}
        for name, slot in slots.items()
        if slot.method is not None
    }
    export = stacks.export(installed.method, sites, params, shared)
    tensors = in_file_form(export.tensors, installed, params)
    for name, each in values.items():
        if name != MODEL and BIAS in each:
            tensors[bias_place(name, installed)] = each[BIAS]
    for name, saved in installed.saved.items():
        twin = saved.modules_to_save[installed.key]
        tensors.update({f"{PREFIX}{name}.{key}": value for key, value in twin.state_dict().items()})
    # A clone each: views and tied tensors cannot be written, and what is written must not change meanwhile.
    tensors = {key: value if id(value) in given else _copied(value) for key, value in sorted(tensors.items())}
    config = {**installed.config.to_dict(), **export.config}
    if "fan_in_fan_out" in config:  # PEFT has it for most methods
        config["fan_in_fan_out"] = any(layer.kind.stores_in_out for layer in installed.layers.values())
    ours = installed.config.ours()
    if not export.peft or _lost_in_peft(installed, list(params)):
        config["peft_type"] = CLOSED + installed.config.peft_type
        checks = {PROJECTIONS: export.checksum, FACTORS: export.fingerprint}  # here too: a header may get lost
        left_out = {key for key, value in export.section.items() if value is None}
        said = {key: value for key, value in {**ours, **export.section}.items() if key not in left_out}
        config[SECTION] = {"format": FORMAT_VERSION, **said, **{k: v for k, v in checks.items() if v is not None}}
        config = {key: value for key, value in config.items() if value is not None}  # PEFT alone asks for those
    elif SELECTION & set(ours) or _taken_otherwise(installed, list(params)):
        # PEFT lacks the key for this method, or would take others: name the layers themselves.
        own = [name for name in params if not part_of(name, installed.layers)]  # it adds the parts by itself
        exact = "|".join(re.escape(name) for name in own)  # a list would match the ends of other names too
        config["target_modules"] = exact
        config.update((key, None) for key in ("layers_to_transform", "layers_pattern") if key in config)
        # The parts of an attention come with it, so leaving one out must stay said.
        if "exclude_modules" in ours and any(layer.kind.with_it for layer in installed.layers.values()):
            config[SECTION] = {"format": FORMAT_VERSION, "exclude_modules": ours["exclude_modules"]}
    checksums = tensors_checksum(tensors), config_checksum(config, installed.config.option_names())
    header = header_metadata(*checksums, export.checksum, export.header, installed.base)
    return config, tensors, {**header, **installed.marks}


def _copied(value: Tensor) -> Tensor:
    return value.detach().cpu().clone().contiguous()


def in_file_form(
    tensors: Mapping[str, Tensor], installed: Installed, params: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors under the keys, and in the shapes, that PEFT has for each kind of layer."""
    result = {full_key(key, params): value for key, value in tensors.items()}
    formed: dict[str, Tensor] = {}
    names = _names_in_file(installed)
    for name, own in params.items():
        layer, method = installed.layers[name], installed.method
        for parameter in (*own, *method.carried):
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
    """The key in the file of the bias that is trained in layer ``name``."""
    layer, slot = installed.layers[name], installed.slots()[name]
    key = bias_key(slot.method, layer.storage)
    return f"{PREFIX}{bias_name_in_file(name, layer.kind, _names_in_file(installed))}.{key}"


def _lost_in_peft(installed: Installed, layers: Sequence[str]) -> bool:
    """Whether PEFT would leave out a part of what its method can do, without a word.

    That are target parameters of a method for which it has no such option, an out_proj without its attention, which it
    would put into a wrapper that is never called, and what it makes of weights that are stored as (in, out).
    """
    config = installed.config
    parameters = bool(config.target_parameters) and "target_parameters" in config.ours()
    turned = installed.method.needs_out_in and any(installed.layers[name].kind.stores_in_out for name in layers)
    return parameters or turned or any(_never_called(name, installed) for name in layers)


def _never_called(name: str, installed: Installed) -> bool:
    layer = installed.layers[name].base_layer
    return isinstance(layer, NonDynamicallyQuantizableLinear) and not part_of(name, installed.layers)


def _taken_otherwise(installed: Installed, layers: Sequence[str]) -> bool:
    """Whether PEFT would take other layers: other blocks, or an attention's out_proj by its name and the attention."""
    config = installed.config
    parts = [name for name in layers if part_of(name, installed.layers)]
    with matching(names=lambda: parts):
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
