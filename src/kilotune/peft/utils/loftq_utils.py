"""As ``peft.utils.loftq_utils``: LoRA that starts with what a quantised base has lost (LoftQ, arXiv 2310.08659)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import AdapterError, CheckpointError, ConfigError, gather
from ...injection import inject
from ...kernels.starts import principal
from ...layers.adapted import AdaptedLayer
from ...methods.lora import Lora
from ..tuners.inside import tuner_in

__all__ = ["replace_lora_weights_loftq"]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give a LoRA over a quantised base the factors that are nearest to what quantising took from its weights.

    The weights before that are read from the base's files, one at a time. For each quantised layer the adapter's
    change, its scale times B A, becomes the nearest matrix of its rank to the difference. The base stays as it is.

    Args:
        peft_model: with a LoRA over layers that are quantised, in 4 bits or otherwise; other layers are passed over.
        model_path: the folder of the base's files, or its ``model.safetensors``; by default where the base came from.
        adapter_name: which adapter.
        callback: (peft_model, name of the layer) after each layer; where it gives False the layer's factors are put
            back, as where they did not help.

    Raises:
        AdapterError: no such adapter, no quantised layer under it, or it is merged.
        ConfigError: another method, DoRA, a start that is a part of the base, or a rank or a scale that cannot be.
        CheckpointError: no safetensors files of the base, or no weights of these shapes in them.

    """
    tuner = tuner_in(peft_model)
    installed = tuner.installed(adapter_name)
    method = installed.method
    if not isinstance(method, Lora) or method.config.from_base:
        raise ConfigError(f"adapter {adapter_name!r}: LoftQ starts a plain LoRA, without DoRA, 'pissa' and 'olora'")
    if adapter_name in tuner.merged_adapters:
        raise AdapterError(f"adapter {adapter_name!r} is merged; unmerge_adapter() first")
    slots = {name: slot for name, slot in installed.slots().items() if slot.method is not None}
    slots = {name: slot for name, slot in slots.items() if not installed.layers[name].storage.lossless}
    if not slots:
        raise AdapterError(f"adapter {adapter_name!r} has no layer over quantised weights; load the base in 4 bits")
    faults = [
        f"{name}: rank {method.rank(slot.site)} of {(slot.site.out, slot.site.inn)}, scale {method.scale(slot.site)}"
        for name, slot in slots.items()
        if method.rank(slot.site) > min(slot.site.out, slot.site.inn) or method.scale(slot.site) <= 0
    ]
    if faults:
        raise ConfigError(gather("LoftQ needs a rank that the weight has, and a scale above 0:", faults))
    files = _Files.of(tuner.model, model_path)
    files.check({f"{name}.weight" for name in slots})
    for name, slot in slots.items():
        own, root = slot.own(), math.sqrt(method.scale(slot.site))
        before = {key: own[key].detach().clone() for key in ("lora_A", "lora_B")}
        lost = _lost(installed.layers[name], name, files.tensor(f"{name}.weight"))
        a, b = principal(lost, method.rank(slot.site))
        own["lora_A"].copy_(a / root)
        own["lora_B"].copy_(b / root)
        if callback is not None and not callback(peft_model, name):
            for key, value in before.items():
                own[key].copy_(value)


def _lost(layer: AdaptedLayer, name: str, weight: Tensor) -> Tensor:
    """What a layer's quantised weight lacks of ``weight``: (out, in), float32."""
    held = layer.storage.read(layer.base_layer, None, torch.float32)
    if held.shape != weight.shape:
        raise CheckpointError(
            f"{name}.weight: {tuple(weight.shape)} in the base's file, {tuple(held.shape)} in the model"
        )
    lost = weight.to(held) - held
    if not bool(torch.isfinite(lost).all()):
        raise CheckpointError(f"{name}.weight: values that are not finite")
    return layer.kind.canonical(layer.base_layer, lost)


@final
class _Files:
    """The safetensors files of a base: which file has which weight, under the names of the model that is here."""

    def __init__(self, places: Mapping[str, Path], prefix: str) -> None:
        self.places, self.prefix = places, prefix

    @classmethod
    def of(cls, model: nn.Module, path: str | os.PathLike[str] | None) -> _Files:
        """Those at a path, or where the model came from."""
        source = inject.base_name(model) if path is None else os.fspath(path)
        if not source:
            raise CheckpointError("model_path: the model does not say where it came from; give the folder of its files")
        prefix = str(getattr(model, "base_model_prefix", ""))
        if Path(source).is_file():
            return cls(dict.fromkeys(_keys(Path(source)), Path(source)), prefix)
        if (whole := _found(source, WHOLE)) is not None:
            return cls(dict.fromkeys(_keys(whole), whole), prefix)
        if (index := _found(source, INDEX)) is None:
            raise CheckpointError(
                f"model_path: neither {WHOLE} nor {INDEX} is in {source}, or in the hub's cache for it"
            )
        try:
            named = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{index} is no index of weights: {error}") from error
        shards = {name: _found(source, name) for name in set(map(str, named.values()))}
        if missing := sorted(name for name, place in shards.items() if place is None):
            raise CheckpointError(f"{index}: there is no {', '.join(missing)}")
        return cls({key: place for key, name in named.items() if (place := shards[str(name)])}, prefix)

    def key(self, name: str) -> str | None:
        """A weight's name in the files, which may lack the model's outermost name."""
        names = (name, name.removeprefix(f"{self.prefix}."), f"{self.prefix}.{name}")
        return next((found for found in names if found in self.places), None)

    def check(self, names: set[str]) -> None:
        """Refuse weights that are not there, all at once."""
        if missing := sorted(name for name in names if self.key(name) is None):
            raise CheckpointError(gather("model_path: weights that the base's files do not have:", missing))

    def tensor(self, name: str) -> Tensor:
        """One weight, on the CPU."""
        key = self.key(name)
        assert key is not None  # check() saw it
        with safe_open(self.places[key], framework="pt", device="cpu") as file:
            found: Tensor = file.get_tensor(key)
        return found


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error


def _found(source: str, name: str) -> Path | None:
    """A file in a folder, or in the hub's cache of a hub id; nothing is fetched."""
    if Path(source).is_dir():
        inside = Path(source) / name
        return inside if inside.is_file() and Path(name).name == name else None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        cached = try_to_load_from_cache(source, name)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None
