"""get_layer_status and get_model_status: what adapters a model has, and how they are, as PEFT tells it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, final

from torch import nn

from ..injection.tree import AroundBase, walk, wrappers
from ..layers.adapted import AdaptedLayer
from ..layers.saved_module import SavedModule
from .layer_shape import slot_name, title
from .on_off import active, is_off

__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]

Mixed = Literal["irregular"]


@final
@dataclass
class TunerLayerStatus:
    """Of one adapted layer: its name, what it is (``lora.Linear``), and each adapter's state there."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@final
@dataclass
class TunerModelStatus:
    """Of a whole model; "irregular" where its layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Mixed
    active_adapters: list[str] | Mixed
    merged_adapters: list[str] | Mixed
    requires_grad: dict[str, bool | Mixed]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Mixed | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each layer that adapters change or replace.

    Args:
        model: a PeftModel, or a base into which adapters were injected.

    """
    base = getattr(model, "base_model", None) if _is_peft_model(model) else model
    prefix = "model." if isinstance(base, AroundBase) else ""
    root = base.model if isinstance(base, AroundBase) else model
    found = []
    for name, module, _ in walk(root):
        for wrapper in wrappers(module):
            if isinstance(wrapper, (AdaptedLayer, SavedModule)):
                found.append(_of_wrapper(f"{prefix}{name}", wrapper))
    return found


def _is_peft_model(model: nn.Module) -> bool:
    return isinstance(model._modules.get("base_model"), AroundBase)


def _of_wrapper(name: str, wrapper: AdaptedLayer | SavedModule) -> TunerLayerStatus:
    held = wrapper.adapters if isinstance(wrapper, AdaptedLayer) else wrapper.modules_to_save
    parameters = {slot_name(key): list(part.parameters()) for key, part in held._modules.items() if part is not None}
    state = wrapper.state
    scheme = getattr(wrapper, "quantization_backend", None) if isinstance(wrapper, AdaptedLayer) else None
    return TunerLayerStatus(
        name=name,
        module_type=title(wrapper) if isinstance(wrapper, AdaptedLayer) else "ModulesToSaveWrapper",
        enabled=not is_off(state),
        active_adapters=active(state),
        merged_adapters=list(wrapper.merged) if isinstance(wrapper, AdaptedLayer) else [],
        requires_grad={key: _one({p.requires_grad for p in own}) for key, own in parameters.items() if own},
        available_adapters=sorted(parameters),
        devices={key: sorted({p.device.type for p in own}) for key, own in parameters.items()},
        quantization_backend=scheme,
    )


def _one(values: Iterable[Any]) -> Any:
    """The value that all have, or "irregular"."""
    found = list(values)
    return found[0] if all(value == found[0] for value in found) else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of a model's adapters; "irregular" where its layers differ.

    Args:
        model: a PeftModel, or a base into which adapters were injected.

    """
    layers = get_layer_status(model)
    base: Any = model._modules.get("base_model") if _is_peft_model(model) else None
    root = model if base is None else base.model
    counted = list(model.parameters()) if base is None else []
    numbers = (
        (sum(p.numel() for p in counted if p.requires_grad), sum(p.numel() for p in counted))
        if base is None
        else base.get_nb_trainable_parameters()
    )
    named = {name for layer in layers for name in layer.requires_grad}
    own = {name: [layer.requires_grad[name] for layer in layers if name in layer.requires_grad] for name in named}
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    partly = any(
        name in layer.available_adapters and name not in layer.merged_adapters for name in merged for layer in layers
    )
    return TunerModelStatus(
        base_model_type=type(root).__name__ if base is not None or hasattr(root, "config") else "other",
        adapter_model_type="None" if base is None else type(base).__name__,
        peft_types={} if base is None else {name: str(c.peft_type) for name, c in base.peft_config.items()},
        trainable_params=numbers[0],
        total_params=numbers[1],
        num_adapter_layers=len(layers),
        enabled=_one(layer.enabled for layer in layers) if layers else False,
        active_adapters=_one(layer.active_adapters for layer in layers) if layers else [],
        merged_adapters="irregular" if partly else merged,
        requires_grad={name: _one(values) for name, values in sorted(own.items())},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={
            name: sorted({d for layer in layers for d in layer.devices.get(name, ())})
            for name in sorted({name for layer in layers for name in layer.devices})
        },
        quantization_backend=_one(layer.quantization_backend for layer in layers) if layers else None,
    )
