"""LoRA adapters of the models of a pipeline as one file that diffusers reads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..adapter_files.files import sort_metadata, tensors_checksum
from ..adapter_files.peft_layout import BASE, PREFIX
from ..adapter_files.writing import DEFAULT, state_of
from ..config import SECTION
from ..errors import CheckpointError, ConfigError, UnsupportedError, gather, type_name
from ..injection.installed_adapter import Installed
from ..methods import LoraConfig
from ..model.adapter_model import AdapterModel
from ..whole_file import replacing
from .loading import FILE_NAME, HEADER

__all__ = ["save_diffusers_lora"]

# diffusers takes a text encoder's keys apart before PEFT does, and knows these endings for all of its layers.
IN_TEXT_ENCODERS = {
    ".lora_A.weight": ".lora_linear_layer.down.weight",
    ".lora_B.weight": ".lora_linear_layer.up.weight",
}


def save_diffusers_lora(
    path: str | os.PathLike[str], components: Mapping[str, AdapterModel], adapter_name: str = DEFAULT
) -> Path:
    """Write a LoRA adapter of one or more models as the one file that ``pipe.load_lora_weights(path)`` reads.

    Ranks and alphas stand in its header, where diffusers has them since June 2025 (pull request 11324). Programs that
    do not read that take the rank for alpha.

    Args:
        path: a folder, made where it is not there, or the name of a ``.safetensors`` file.
        components: the models with their adapters (what ``get_peft_model`` or ``load_diffusers_lora`` gave), by their
            names in the pipeline: "unet" or "transformer", "text_encoder", "text_encoder_2", "text_encoder_3".
        adapter_name: which adapter, of all of them.

    Returns:
        The file, there whole or not at all.

    Raises:
        UnsupportedError: something of an adapter has no place in such a file. AdapterError: a model has no such
            adapter. CheckpointError: it cannot be written.

    """
    if not components:
        raise ConfigError("components: expected the models with their adapters, such as {'unet': model}")
    faults = [_name_fault(name) or _model_fault(name, model) for name, model in components.items()]
    if found := [fault for fault in faults if fault]:
        raise ConfigError(gather("save_diffusers_lora:", found))
    installed = {name: model.installed(adapter_name) for name, model in components.items()}
    if found := [f"{name}: {fault}" for name, each in installed.items() for fault in _faults(each)]:
        raise UnsupportedError(gather("not for a file of diffusers:", found))
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    header = {"format": "pt"}
    for name, each in installed.items():
        config, own, _ = state_of(each)
        if SECTION in config:
            raise UnsupportedError(f"{name}: PEFT, and so diffusers, has no form for this adapter")
        tensors.update({_key(name, key): value for key, value in own.items()})
        said.update({f"{name}.{option}": value for option, value in config.items()})
        if each.base is not None:
            header[f"{BASE}.{name}"] = each.base
    header |= {HEADER: json.dumps(said, sort_keys=True), "kilotune_sha256": tensors_checksum(tensors)}
    return _write(Path(path), tensors, header)


def _name_fault(name: str) -> str | None:
    plain = name.isidentifier() and "." not in name
    return None if plain else f"{name!r}: expected the name of a model in a pipeline, such as 'unet'"


def _model_fault(name: str, model: object) -> str | None:
    if isinstance(model, AdapterModel):
        return None
    return f"{name}: expected the model that get_peft_model gives, got {type_name(model)}"


def _faults(installed: Installed) -> list[str]:
    config = installed.config
    if not isinstance(config, LoraConfig):
        return [f"{installed.method.name} is not LoRA; kilotune.convert.to_lora makes an exact LoRA of it"]
    more = {
        f"bias={config.bias!r}": config.bias != "none",
        "modules_to_save": bool(installed.saved),
        "target_parameters": bool(config.target_parameters),
        f"init_lora_weights={config.init_lora_weights!r} (convert.to_lora makes a plain LoRA of it)": config.from_base,
        "a shared adapter that it stands on, without which it is another one": bool(installed.marks),
    }
    faults = [f"{what}: has no place in it" for what, there in more.items() if there]
    grouped = [name for name, layer in installed.layers.items() if layer.kind.groups(layer.base_layer) > 1]
    return faults + [f"{name}: a convolution with groups, for which PEFT has another form" for name in grouped]


def _key(component: str, key: str) -> str:
    name = key.removeprefix(PREFIX)
    for ending, theirs in IN_TEXT_ENCODERS.items() if component.startswith("text_encoder") else ():
        if name.endswith(ending):
            name = name.removesuffix(ending) + theirs
    return f"{component}.{name}"


def _write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    place = path if path.suffix == ".safetensors" and not path.is_dir() else path / FILE_NAME
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place, shared=True, flushed=True) as fresh:
            fresh.touch()
            mode = fresh.stat().st_mode
            save_file(dict(tensors), fresh, metadata=dict(header))
            sort_metadata(fresh)
            fresh.chmod(mode)  # safetensors makes files that only we can read
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise CheckpointError(f"cannot write {place}: {error}") from error
    return place
