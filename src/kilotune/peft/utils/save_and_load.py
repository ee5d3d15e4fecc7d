"""An adapter's numbers out of a model and into it, under the keys of PEFT's files."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapter_files import writing
from ...adapter_files.files import TwoFiles, locate, read_config, read_weights, tensors_checksum, weights_of, write
from ...adapter_files.fitting import match_tensors, wanted_of
from ...adapter_files.names import CONFIG_NAME
from ...adapter_files.peft_layout import PREFIX
from ...adapter_files.reading import AdapterFile, parse
from ...adapter_files.writing import DEFAULT, state_of
from ...errors import CheckpointError, ConfigError, MergeError, gather
from ...injection import inject
from ...injection.installed_adapter import Installed
from ...injection.tree import bare_state
from ...methods import Method
from ...methods.dora import Dora
from ...methods.lora import Lora
from ...whole_file import replacing
from ..layer_shape import LAYER
from ..tuners.inside import is_injected, tuner_in
from ..tuners.tuners_utils import BaseTuner

__all__ = [
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "lora_of",
    "refuse_embedding_layers",
    "renamed",
    "replace_numbers",
    "save_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "write_auto_mapping",
]


class LoadedKeys(NamedTuple):
    """Keys that a model has and a state lacked, and keys of the state that the model does not have."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = DEFAULT,
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the keys of PEFT's files: no adapter's name in them. Copies, on the CPU.

    Those of a base into which it was injected have the base's own names, without ``base_model.model.``, as in PEFT.
    Of an adapter that has no numbers yet they are on the meta device.

    Args:
        model: a PeftModel, or a base into which adapters were injected.
        state_dict: the model's state in place of its own, as where it was gathered.
        adapter_name: which adapter.
        unwrap_compiled: the model is compiled; what it was made of is asked.
        save_embedding_layers: "auto" and False: an embedding's base weight is not among them. True is refused.

    Raises:
        ConfigError: save_embedding_layers=True.

    """
    refuse_embedding_layers(save_embedding_layers)
    whole = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    installed = tuner_in(whole).installed(adapter_name)
    empty = state_dict is None and any(p.is_meta for slot in installed.slots().values() for p in slot.parameters())
    found = state_of(installed, _values(installed))[1] if empty else _state(installed, state_dict)[1]
    found = {key: value.to("meta") if empty else value for key, value in found.items()}
    return {key.removeprefix(PREFIX): value for key, value in found.items()} if is_injected(whole) else found


def refuse_embedding_layers(asked: str | bool) -> None:
    """Refuse to write the base's own embedding beside an adapter, which PEFT's option of that name asks for."""
    if asked is True:
        raise ConfigError("save_embedding_layers=True: name the embedding in modules_to_save, which trains it too")


def _state(
    installed: Installed, given: Mapping[str, Tensor] | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    if given is None:
        return state_of(installed)
    values = {layer: {own: _found(given, key) for own, key in keys.items()} for layer, keys in _live(installed).items()}
    config, tensors, header = state_of(installed, values)
    for name in installed.saved:
        for key in [key for key in tensors if key.startswith(f"{PREFIX}{name}.")]:
            inside = key.removeprefix(f"{PREFIX}{name}.")
            tensors[key] = _found(given, f"{name}.modules_to_save.{installed.key}.{inside}")
    header.update({"kilotune_sha256": tensors_checksum(tensors)})
    return config, tensors, header


def _live(installed: Installed) -> dict[str, dict[str, str]]:
    """Layer -> own name of a parameter -> its name in the base model's state."""
    found: dict[str, dict[str, str]] = {}
    for name, slot in installed.slots().items():
        shown = LAYER.names(installed.layers[name])
        keys = {own: f"adapters.{installed.key}.{own}" for own in slot.values()}
        found[name] = {own: f"{name}.{shown[key]}" for own, key in keys.items() if key in shown}
    return found


def _found(given: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor of a state under a name of the base's, whatever stands before it; on the CPU."""
    for prefix in ("", PREFIX, "model."):
        if (value := given.get(f"{prefix}{key}")) is not None:
            return value.detach().cpu().clone().contiguous()
    raise CheckpointError(f"state_dict: there is no {PREFIX}{key}, which the adapter has")


def save_adapter(
    model: nn.Module, adapter_name: str, folder: Path, state: Mapping[str, Tensor] | None, is_main_process: bool
) -> None:
    """Write one adapter into a folder, from the model's numbers or from a state of them."""
    tuner = tuner_in(model)
    installed = tuner.installed(adapter_name)
    replication = getattr(tuner.peft_config.get(adapter_name), "layer_replication", None)
    if state is None and not replication:
        writing.save({folder: installed}, is_main_process)
    elif is_main_process:
        config, tensors, header = _state(installed, state)
        write(folder, {**config, "layer_replication": replication} if replication else config, tensors, header)


def write_auto_mapping(folder: Path, base: nn.Module) -> None:
    """Say the base's class in the configuration of an adapter without a task, for ``AutoPeftModel``.

    Only of transformers' models: no other class is loaded by its name.
    """
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("task_type") is not None or not type(base).__module__.startswith("transformers."):
        return
    config["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- into a model ------------------------------------------------------------------------------------------


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = DEFAULT,
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadedKeys:
    """Give an adapter that is in a model the numbers of a state with the keys of PEFT's files.

    Args:
        model: a PeftModel, or a base into which adapters were injected.
        peft_model_state_dict: what :func:`get_peft_model_state_dict` gives.
        adapter_name: which adapter.
        ignore_mismatched_sizes: pass over tensors of other shapes, with a warning.
        low_cpu_mem_usage: as in PEFT; what is on the meta device comes to its layer's in any case.

    Returns: the adapter's keys that were not given, and the given ones that are none of its.

    Raises:
        CheckpointError: shapes differ, values are not finite, or frozen matrices are others than the adapter's; nothing
            is changed then. MergeError: the adapter is merged.

    """
    return _take(tuner_in(model), peft_model_state_dict, adapter_name, ignore_mismatched_sizes)


@torch.no_grad()
def replace_numbers(model: nn.Module, file: AdapterFile, adapter_name: str) -> LoadedKeys:
    """Give an adapter that is in a model the numbers of a file, whose options have to mean the same.

    Raises:
        CheckpointError: shapes or options differ, or values are not finite; nothing is changed then.

    """
    tuner = tuner_in(model)
    if faults := _other_options(tuner.installed(adapter_name), file):
        raise CheckpointError(
            gather(
                f"{file.folder}: its numbers mean something else with the options that adapter {adapter_name!r} has in "
                "this model; delete_adapter() first, or load it under another name:",
                faults,
            )
        )
    return _take(tuner, file.files.tensors, adapter_name, doubled=file.doubled)


# Options that say what an adapter's numbers mean; of LoRA there is its scale beside them.
MEANING = ("use_dora", "part_of_base", "projection_prng_key", "sharing", "proj_seed", "topk", "feedforward_modules")


def _other_options(installed: Installed, file: AdapterFile) -> list[str]:
    ours, theirs = installed.config, file.config
    if type(ours) is not type(theirs):
        return [f"it is of {theirs.peft_type}, and {installed.adapter!r} of {ours.peft_type}"]
    pairs = [(name, getattr(theirs, name, None), getattr(ours, name, None)) for name in MEANING]
    faults = [f"{name}: {a!r:.100} in the file, {b!r:.100} in the model" for name, a, b in pairs if a != b]
    here, there = lora_of(installed.method), lora_of(file.method)
    if here is None or there is None:
        return faults
    sites = {name: slot.site for name, slot in installed.slots().items() if slot.method is not None}
    scales = {name: (there.scale(site), here.scale(site)) for name, site in sites.items()}
    other = {name: pair for name, pair in scales.items() if not math.isclose(*pair, rel_tol=1e-6)}
    return faults + [f"{name}: a scale of {a:g} in the file, {b:g} in the model" for name, (a, b) in other.items()]


def lora_of(method: Method[Any]) -> Lora | None:
    """The LoRA that a method is, or that is inside of it; None where there is none."""
    inner = method.inner if isinstance(method, Dora) else method
    return inner if isinstance(inner, Lora) else None


def _same(given: Tensor, own: Tensor) -> bool:
    """Whether they are the same numbers, but for what 16 bits leave of them."""
    wide = own.to(torch.float32)
    return given.shape == own.shape and torch.allclose(
        given.to(wide), wide, rtol=1e-2, atol=1e-2 * float(wide.abs().max()) if wide.numel() else 0.0
    )


def _take(
    tuner: BaseTuner,
    state: Mapping[str, Tensor],
    adapter_name: str,
    ignore_mismatched_sizes: bool = False,
    doubled: bool | None = False,
) -> LoadedKeys:
    installed = tuner.installed(adapter_name)
    if adapter_name in tuner.merged_adapters:
        raise MergeError(f"adapter {adapter_name!r} is merged, and would act as before; call unmerge_adapter() first")
    config, own, _ = state_of(installed, _values(installed))
    given = {key if key.startswith("base_model.") else f"{PREFIX}{key}": value for key, value in state.items()}
    fits = {key: value for key, value in given.items() if key in own}
    if ignore_mismatched_sizes and (other := [key for key in fits if fits[key].shape != own[key].shape]):
        warnings.warn(f"passed over, for their shapes differ: {', '.join(other)}", stacklevel=4)
        fits = {key: value for key, value in fits.items() if key not in other}
    file = parse(TwoFiles(Path(adapter_name), config, {**own, **fits}, {"kilotune_format": "1"}))
    if faults := [key for key in file.brought if key in fits and not _same(fits[key], own[key])]:
        raise CheckpointError(gather("frozen matrices that are others than the adapter has in this model:", faults))
    made = inject.plan(tuner.model, adapter_name, installed.config, file.method, strict=False)
    tensors = match_tensors(replace(file, doubled=doubled), made, type(tuner.model).__name__)
    layered = {key.removeprefix(PREFIX): value for key, value in fits.items() if key.startswith(PREFIX)}
    known = file.method.from_layers(file.method.config, layered)
    told = {target for key, (target, _) in wanted_of(made).items() if key in known}
    _put(installed, {key: value for key, value in tensors.items() if key in told or key not in _of_layers(installed)})
    for key, shared in installed.shared.trained.items():
        if (value := fits.get(f"base_model.{key}")) is not None:
            shared.copy_(value)
    return LoadedKeys([key for key in own if key not in given], [key for key in given if key not in own])


def _values(installed: Installed) -> dict[str, dict[str, Tensor]]:
    """An adapter's numbers by layer, on the CPU; zeros for those that it does not have yet."""
    return {
        name: {
            key: torch.zeros(p.shape, dtype=p.dtype) if p.is_meta else p.detach().cpu().clone().contiguous()
            for key, p in slot.values().items()
        }
        for name, slot in installed.slots().items()
    }


def _of_layers(installed: Installed) -> set[str]:
    return {f"{name}.{key}" for name, slot in installed.slots().items() for key in slot.values()}


def _put(installed: Installed, tensors: Mapping[str, Tensor]) -> None:
    """Give an adapter's parameters new numbers, by ``<layer>.<parameter>``, and its heads theirs."""
    for name, slot in installed.slots().items():
        for key, parameter in slot.values().items():
            if (value := tensors.get(f"{name}.{key}")) is None:
                continue
            if parameter.is_meta:
                here = value.to(installed.layers[name].compute_device(), parameter.dtype, copy=True)
                setattr(slot, key, nn.Parameter(here, requires_grad=parameter.requires_grad))
            else:
                parameter.copy_(value)
    for name, saved in installed.saved.items():
        twin = saved.modules_to_save[installed.key]
        twin.load_state_dict({key: tensors[f"{name}.{key}"] for key in twin.state_dict()})


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> dict[str, Tensor]:
    """The tensors of an adapter's file, under its keys.

    Raises:
        CheckpointError: there is none, or it is damaged or a pickle.

    """
    options = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
    folder = locate(model_id, **options, local_files_only=local_files_only)
    tensors, _ = read_weights(weights_of(folder, read_config(folder / CONFIG_NAME)))
    tensors = renamed(tensors, key_mapping)
    return {key: value if device is None else value.to(device) for key, value in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Tensors of a file whose keys, without their prefix, are changed by patterns."""
    if not key_mapping:
        return dict(tensors)
    found = {}
    for key, value in tensors.items():
        inner = key.removeprefix(PREFIX)
        for pattern, replacement in key_mapping.items():
            inner, count = re.subn(pattern, replacement, inner)
            if count:
                break
        found[f"{PREFIX}{inner}" if key.startswith(PREFIX) else inner] = value
    return found


# -- the base's own numbers ----------------------------------------------------------------------------------


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's own state, by its own names, without adapters."""
    return bare_state(tuner_in(model).model)


@torch.no_grad()
def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadedKeys:
    """Give the base other numbers, by its own names; adapters stay as they are.

    Raises:
        CheckpointError: with ``strict``, keys that are missing or unknown; shapes that differ.
        MergeError: an adapter is merged, so that taking it out would bring the numbers of before back.

    """
    if merged := tuner_in(model).merged_adapters:
        raise MergeError(f"{merged} are merged into the base's numbers; call unmerge_adapter() before giving it others")
    own = get_base_model_state_dict(model)
    missing = [key for key in own if key not in state_dict]
    unknown = [key for key in state_dict if key not in own]
    other = [key for key, value in state_dict.items() if key in own and own[key].shape != value.shape]
    if other or (strict and (missing or unknown)):
        raise CheckpointError(f"state_dict: missing {missing[:5]}, unknown {unknown[:5]}, of other shapes {other[:5]}")
    for key, value in state_dict.items():
        if key in own:
            own[key].copy_(value)
    return LoadedKeys(missing, unknown)
