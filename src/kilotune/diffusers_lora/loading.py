"""A LoRA file of diffusers or kohya into the models of a pipeline: all of it, or one error with what does not fit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..adapter_files.files import TwoFiles, read_weights
from ..adapter_files.fitting import match_tensors
from ..adapter_files.names import check_adapter_name
from ..adapter_files.peft_layout import BASE
from ..adapter_files.reading import AdapterFile, parse
from ..candidates import Candidate, candidates
from ..deltas import Need
from ..errors import AdapterError, CheckpointError, ConfigError, KilotuneError, did_you_mean, faults_of, gather
from ..injection import inject
from ..injection.tree import is_parameter, unwrapped, walk
from ..methods import LoraConfig
from ..model.adapter_model import DEFAULT, AdapterModel
from ..model.peft_model import PeftModel
from .keys import Pieces, taken_apart
from .names import Layer, Names
from .translating import Translation, lora_config, translated

__all__ = ["FILE_NAME", "HEADER", "load_diffusers_lora", "read_diffusers_lora"]

FILE_NAME = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"  # in the file's header: JSON, PEFT's options of each model


def load_diffusers_lora(
    source: str | os.PathLike[str],
    components: Mapping[str, object],
    adapter_name: str = DEFAULT,
    is_trainable: bool = False,
    *,
    leave_out: Sequence[str] = (),
) -> dict[str, AdapterModel]:
    """Put a LoRA file of diffusers, or of kohya's trainers, into the models of a pipeline.

    ::

        models = load_diffusers_lora("pytorch_lora_weights.safetensors", pipe.components)
        pipe(...)                           # runs with it: the models are changed in place
        with models["unet"].disable_adapter(): ...

    Each layer keeps its own rank and its own alpha. Everything is checked before any model is touched.

    Args:
        source: a ``.safetensors`` file, or the folder that it is in.
        components: the models by their names in the pipeline: "unet" or "transformer", "text_encoder", "text_encoder_2"
            and "text_encoder_3". What is no module (a tokenizer, None) is passed over. A model that has adapters of
            kilotune already (the result of ``get_peft_model``) gets one more.
        adapter_name: what to call it in each of the models.
        is_trainable: False: its parameters are frozen, and the models are put into eval mode.
        leave_out: models for which the file has layers that are not wanted.

    Returns:
        The models that the file has layers for, with the adapter in them: active where it is the first one.

    Raises:
        CheckpointError: the file is damaged, or does not fit: one error for all models, with the nearest names.
        AdapterError: the name is taken. ConfigError: ``leave_out`` names what is not in the file.

    """
    check_adapter_name(adapter_name)
    found = read_diffusers_lora(source, components, leave_out)
    held = {name: _module(components, name) for name in found}
    taken = [n for n, m in held.items() if isinstance(m, AdapterModel) and adapter_name in m.peft_config]
    if taken:
        raise AdapterError(f"the adapter name {adapter_name!r} is taken in {', '.join(taken)}; take another name")
    faults = []
    for name, file in found.items():
        root = _root(held[name])
        if not isinstance(held[name], AdapterModel):
            inject.check_base(root)
        try:
            match_tensors(file, inject.plan(root, adapter_name, file.config, strict=False), type(root).__name__)
        except CheckpointError as error:
            faults += [f"{name}: {fault}" for fault in faults_of(error)]
    if faults:
        raise CheckpointError(gather(f"{_path(source)} does not fit:", faults))
    return {name: _loaded(held[name], file, adapter_name, is_trainable) for name, file in found.items()}


def _loaded(model: nn.Module, file: AdapterFile, name: str, is_trainable: bool) -> AdapterModel:
    if isinstance(model, AdapterModel):
        model.load_adapter(file, name, is_trainable)
        return model
    return PeftModel.from_pretrained(model, file, name, is_trainable)


def read_diffusers_lora(
    source: str | os.PathLike[str], components: Mapping[str, object], leave_out: Sequence[str] = ()
) -> dict[str, AdapterFile]:
    """The adapters in such a file, one of each model, as ``load_adapter`` and a store take them; changes nothing.

    The arguments and the errors are those of :func:`load_diffusers_lora`.
    """
    path = _path(source)
    models = {name: module for name, module in components.items() if isinstance(module, nn.Module)}
    if not models:
        raise ConfigError("components: expected the models of a pipeline by their names, such as {'unet': pipe.unet}")
    tensors, header = read_weights(path)
    pieces = taken_apart(tensors, models)
    _check_left_out(leave_out, pieces)
    said = _said(header, path)
    faults = [fault.text for fault in pieces.faults if fault.component not in leave_out]
    made: dict[str, Translation] = {}
    for name in [name for name in pieces.components if name not in leave_out]:
        if name not in models:
            count = sum(place.component == name for place in pieces.layers)
            faults.append(
                f"{name}: the file has {count} of its layers, and it is not among the models given "
                f"({', '.join(sorted(models))}); give it, or say leave_out=[{name!r}]"
            )
            continue
        own = {place: parts for place, parts in pieces.layers.items() if place.component == name}
        made[name] = translated(own, Names(_layers(_root(models[name]))), _of_component(said, name))
        faults += [f"{name}: {fault}" for fault in (*made[name].faults, *_missing(made[name], models[name]))]
    if not faults and not made:
        faults.append("no layers of LoRA in it")
    if faults:
        raise CheckpointError(gather(f"{path} cannot be read as LoRA of these models:", faults))
    return {name: _file(path, name, part, header, _root(models[name])) for name, part in made.items()}


# -- the file ------------------------------------------------------------------------------------------


def _path(source: str | os.PathLike[str]) -> Path:
    path = Path(source)
    if not path.is_dir():
        if path.exists() and path.suffix != ".safetensors":
            raise CheckpointError(f"{path}: expected a .safetensors file; others can run any code when they are loaded")
        return path
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME
    there = sorted(path.glob("*.safetensors"))
    if len(there) != 1:
        names = ", ".join(each.name for each in there[:10]) or "none"
        raise CheckpointError(f"{path}: expected {FILE_NAME} in it, or one .safetensors file; there: {names}")
    return there[0]


def _said(header: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        said = json.loads(header.get(HEADER) or "{}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {HEADER} in its header is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: {HEADER} in its header: expected an object, got {type(said).__name__}")
    return said


def _of_component(said: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What the header says of one model; a file of one model does not name it there."""
    own = {key.removeprefix(f"{name}."): value for key, value in said.items() if key.startswith(f"{name}.")}
    return own or {key: value for key, value in said.items() if "." not in key} or None


def _check_left_out(leave_out: Sequence[str], pieces: Pieces) -> None:
    if isinstance(leave_out, str):
        raise ConfigError(f"leave_out: expected a list of models, got {leave_out!r}")
    for name in leave_out:
        if name not in pieces.components:
            raise ConfigError(
                f"leave_out: the file has no layers of {name!r}, only of {', '.join(pieces.components)}."
                f"{did_you_mean(name, pieces.components)}"
            )


# -- the models ----------------------------------------------------------------------------------------


def _module(components: Mapping[str, object], name: str) -> nn.Module:
    module = components[name]
    assert isinstance(module, nn.Module)
    return module


def _root(module: object) -> nn.Module:
    """The base model."""
    root = module.model if isinstance(module, AdapterModel) else module
    assert isinstance(root, nn.Module)
    return root


def _layers(root: nn.Module) -> dict[str, Layer]:
    """What LoRA can change in a model."""
    modules = ((n, unwrapped(m), parent) for n, m, parent in walk(root, aliases=True) if n and not is_parameter(m))
    return {each.name: _layer(each) for each in candidates(modules) if _is_linear(each)}


def _is_linear(candidate: Candidate) -> bool:
    return candidate.kind is not None and candidate.storage is not None and Need.LINEAR in candidate.kind.offers


def _layer(candidate: Candidate) -> Layer:
    assert candidate.kind is not None
    return Layer(candidate.kind.features(candidate.module)[0], getattr(candidate.kind, "dimensions", 0))


def _missing(made: Translation, module: nn.Module) -> list[str]:
    """The layers that the header's targets take, and the file has no tensors of: it was cut off or put together."""
    config, root = made.said, _root(module)
    if config is None or config.target_modules is None or made.faults:
        return []
    names, layers = config.target_modules, _layers(root)
    if not hasattr(root, "text_model"):
        if isinstance(names, str) and "text_model" in names:
            return []  # an expression for names that are others here
        names = names if isinstance(names, str) else [name.removeprefix("text_model.") for name in names]
    # diffusers names layers whole, and does not mean others that end so.
    whole = [] if isinstance(names, str) else [name for name in names if name in layers]
    targets = names if isinstance(names, str) else [name for name in names if name not in layers]
    try:
        own = config.replace(target_modules=targets, task_type=None) if targets else None
        wanted = [*whole, *(() if own is None else inject.plan(root, "header", own, strict=False).layers)]
    except KilotuneError as error:
        return [f"the header: {fault}" for fault in faults_of(error)]
    return [f"{name}: missing in the file, whose header names it" for name in wanted if name not in made.layers]


def _file(path: Path, name: str, made: Translation, header: Mapping[str, str], root: nn.Module) -> AdapterFile:
    config: LoraConfig = lora_config(made, [each for each, _, _ in walk(root, aliases=True) if each])
    base = header.get(f"{BASE}.{name}")
    file = parse(TwoFiles(path, config.to_dict(), made.tensors(), {} if base is None else {BASE: base}))
    return replace(file, doubled=False)
