"""Our wrappers under PEFT's names: ``layer.lora_A["default"].weight``, ``layer.scaling``.

A trained tensor of ours, ``layer.adapters[name].lora_A``, is shown as PEFT has it, ``layer.lora_A[name].weight``. It is
the same parameter, so that what is written there is what runs. The wrappers themselves stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ..adapter_files.writing import DEFAULT
from ..deltas import Full, LowRank, Rescale
from ..errors import AdapterError
from ..layers.adapted import AdaptedLayer
from ..layers.in_order import weight_with
from ..layers.outside import Outside
from ..layers.saved_module import SavedModule
from ..layers.slot import BIAS, Slot, slot_key
from ..methods.ia3 import Ia3
from .on_off import active, is_off, set_active, switch

__all__ = [
    "LAYER",
    "SAVED",
    "TUNER",
    "Scaling",
    "adapters_in",
    "becomes_lora",
    "key_in_layer",
    "low_rank",
    "slot_name",
    "title",
]

MAGNITUDE = "lora_magnitude_vector"  # in a file without the ".weight" that it has in a model
DROPOUT = "lora_dropout"
# What each method calls the dropout on its input.
DROPOUTS = {"lora": DROPOUT, "vera": "vera_dropout", "unilora": "unilora_dropout", "vblora": "vblora_dropout"}


def adapters_in(layer: AdaptedLayer) -> dict[str, Slot]:
    """The adapters in a layer that a method has there, by name."""
    found = {slot_name(key): cast(Slot, slot) for key, slot in layer.adapters._modules.items()}
    return {name: slot for name, slot in found.items() if slot.method is not None}


def slot_name(key: str) -> str:
    """The adapter's name of a slot's key."""
    return key.removesuffix("%").replace("%2E", ".").replace("%25", "%")


def key_in_layer(layer: AdaptedLayer, slot: Slot, parameter: str) -> tuple[str, str]:
    """(``lora_A``, ``weight``) of a trained tensor; the second is "" where PEFT keeps the tensor itself in a list."""
    if parameter == BIAS or slot.method is None:
        return "trained_bias", ""
    key = layer.kind.file_key(layer.base_layer, slot.method.keys[parameter])
    head, _, rest = key.partition(".")
    return head, "weight" if head == MAGNITUDE else rest


def _shown(layer: AdaptedLayer) -> Iterator[tuple[str, str, str, str, nn.Parameter]]:
    """(key of the slot, own name there, head, rest, parameter) of all tensors of a layer that PEFT has too."""
    for key, slot in layer.adapters._modules.items():
        assert isinstance(slot, Slot)
        for name, parameter in slot.values().items():
            yield key, name, *key_in_layer(layer, slot, name), parameter


@final
class _Factor(nn.Linear):
    """A factor as a linear layer without bias; another parameter that is put into it comes into the slot."""

    def __init__(self, slot: Slot, name: str, parameter: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.__dict__["held"] = (slot, name)
        self.out_features, self.in_features = parameter.shape[0], parameter.shape[-1]
        self._parameters["weight"], self._parameters["bias"] = parameter, None

    def _get_name(self) -> str:
        return "Linear"

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight" and isinstance(value, nn.Parameter):
            slot, own = self.__dict__["held"]
            slot.register_parameter(own, value)


@final
class _Held(nn.ParameterDict):
    """Tensors that PEFT keeps in a list; another parameter that is put there comes into the slot."""

    def __init__(self, slots: Mapping[str, tuple[nn.Module, str, nn.Parameter]]) -> None:
        super().__init__()
        self.__dict__["held"] = {key: (slot, name) for key, (slot, name, _) in slots.items()}
        for key, (_, _, parameter) in slots.items():
            self._parameters[key] = parameter
            self._keys[key] = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and name in self.__dict__["held"]:
            slot, own = self.__dict__["held"][name]
            slot.register_parameter(own, value)


def _heads(layer: AdaptedLayer) -> dict[str, nn.Module]:
    """The containers that PEFT has in such a layer, by name, made anew."""
    modules: dict[str, dict[str, nn.Module]] = {}
    tensors: dict[str, dict[str, tuple[nn.Module, str, nn.Parameter]]] = {}
    for key, name, head, rest, parameter in _shown(layer):
        slot = cast(Slot, layer.adapters._modules[key])
        if rest:
            modules.setdefault(head, {})[key] = _Factor(slot, name, parameter)
        else:
            tensors.setdefault(head, {})[key] = (slot, name, parameter)
    for adapter, slot in adapters_in(layer).items():
        if (held_under := DROPOUTS.get(slot.method.name if slot.method else "")) is not None:
            modules.setdefault(held_under, {})[adapter] = slot.dropout or nn.Identity()
    found: dict[str, nn.Module] = {head: nn.ModuleDict(own) for head, own in modules.items()}
    return {**found, **{head: _Held(own) for head, own in tensors.items()}}


# -- numbers of a low-rank adapter -----------------------------------------------------------------------


def low_rank(slot: Slot) -> LowRank | None:
    """What an adapter makes of its layer, where that is of a low rank; in DoRA, what is inside."""
    strength = slot.strength
    if isinstance(strength, Tensor):
        with _of_strength(slot, 1.0):
            whole = low_rank(slot)
        return None if whole is None else whole.times(float(strength))
    delta = slot.delta()
    inner = delta.inner if isinstance(delta, Rescale) else delta
    return inner if isinstance(inner, LowRank) else None


@contextmanager
def _of_strength(slot: Slot, strength: float) -> Iterator[None]:
    before, slot.strength = slot.strength, strength
    try:
        yield
    finally:
        slot.strength = before


@final
class Scaling(MutableMapping[str, Any]):
    """What each adapter's product is multiplied by in a layer; setting one holds until it is set again, in no file.

    A number, or a tensor () after ``prepare_model_for_compiled_hotswap``.
    """

    def __init__(self, layer: AdaptedLayer) -> None:
        self._layer = layer

    def _slot(self, name: str) -> Slot:
        if name not in (own := adapters_in(self._layer)):
            raise KeyError(name)
        return own[name]

    def __getitem__(self, name: str) -> Any:
        strength = self._slot(name).strength
        if isinstance(strength, Tensor):
            return strength
        delta = low_rank(self._slot(name))
        if delta is None:
            raise KeyError(name)
        return delta.scale

    def __setitem__(self, name: str, value: Any) -> None:
        slot, now = self._slot(name), self[name]
        if self._layer.state.open_routes():
            raise AdapterError("cannot change an adapter's scaling while a route is open; leave its context first")
        if isinstance(slot.strength, Tensor):
            slot.strength = slot.strength.new_tensor(float(value))
            return
        whole = now / slot.strength if slot.strength else low_rank_scale(slot)
        if whole:
            slot.strength = float(value) / whole
        elif value:
            raise AdapterError(f"scaling[{name!r}]: its lora_alpha is 0, so it acts at no strength; train another one")

    def __delitem__(self, name: str) -> None:
        raise AdapterError(f"scaling[{name!r}] is the adapter's as long as it is there; delete_adapter() instead")

    def __iter__(self) -> Iterator[str]:
        return (name for name, slot in adapters_in(self._layer).items() if low_rank(slot) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


def low_rank_scale(slot: Slot) -> float:
    """The scale that a low-rank adapter's options say."""
    if isinstance(slot.strength, Tensor):
        return slot.said
    with _of_strength(slot, 1.0):
        delta = low_rank(slot)
    return 1.0 if delta is None else delta.scale


def _set_scale(layer: AdaptedLayer, adapter: str, scale: float) -> None:
    """Multiply what the options say by ``scale``, in place of what it was multiplied by before."""
    scaling = Scaling(layer)
    if adapter in scaling:
        scaling[adapter] = scale * low_rank_scale(adapters_in(layer)[adapter])


def _scale_layer(layer: AdaptedLayer, scale: float) -> None:
    for name in layer.state.active:
        if name in (scaling := Scaling(layer)):
            scaling[name] = scaling[name] * scale


def _unscale_layer(layer: AdaptedLayer, scale: float | None = None) -> None:
    for name in layer.state.active:
        if name in (scaling := Scaling(layer)):
            whole = low_rank_scale(adapters_in(layer)[name])
            scaling[name] = whole if scale is None else scaling[name] / scale


def becomes_lora(layer: AdaptedLayer, slot: Slot) -> bool:
    """Whether a LoRA adapter can stand for an adapter in a layer: it adds to a weight that is one matrix."""
    kind, method = layer.kind, slot.method
    adds = method is not None and (method.makes in (LowRank, Full) or method.name == "dora")
    return adds and kind.parameter is None and not kind.substitutes and kind.groups(layer.base_layer) == 1


def _supports_lora_conversion(layer: AdaptedLayer, adapter_name: str = DEFAULT) -> bool:
    slot = layer.slot(adapter_name)
    return slot is not None and becomes_lora(layer, slot)


@torch.no_grad()
def _delta_weight(layer: AdaptedLayer, adapter: str) -> Tensor:
    """What merging an adapter would add to the weight, in its layout and dtype."""
    delta = adapters_in(layer)[adapter].delta()
    assert delta is not None
    base = layer.base_matrix()
    wide = base.to(torch.promote_types(base.dtype, torch.float32)) if base.is_floating_point() else base
    change = weight_with(wide, [delta]) - wide
    return layer.kind.native(layer.base_layer, change).to(base.dtype)


def _options(layer: AdaptedLayer, name: str) -> dict[str, Any]:
    """An option of each adapter's configuration in a layer."""
    found = {
        adapter: getattr(slot.method.config, name, None) for adapter, slot in adapters_in(layer).items() if slot.method
    }
    return {adapter: value for adapter, value in found.items() if value is not None}


def _ranks(layer: AdaptedLayer) -> dict[str, int]:
    found = {name: low_rank(slot) for name, slot in adapters_in(layer).items()}
    held = {name: slot.own().get("lora_A") for name, slot in adapters_in(layer).items()}  # a start's change has twice r
    ranks = {name: delta.a if (a := held[name]) is None else a for name, delta in found.items() if delta is not None}
    return {name: a.shape[-2] for name, a in ranks.items()}


def _one_or_all(names: list[str]) -> str | list[str]:
    return names[0] if len(names) == 1 else names


def _is_feedforward(layer: AdaptedLayer) -> bool:
    """Whether IA3 scales the layer's input, and not its output."""
    for slot in adapters_in(layer).values():
        if isinstance(slot.method, Ia3):
            return slot.method.is_feedforward(slot.site)
    raise AttributeError("is_feedforward")


def _parameter_name(layer: AdaptedLayer) -> str:
    if layer.kind.parameter is None:
        raise AttributeError("parameter_name")
    return layer.kind.parameter


def _positions(layer: AdaptedLayer) -> int:
    return layer.kind.kernel_positions(layer.base_layer)


def _trained_heads(layer: AdaptedLayer) -> list[str]:
    return [head for head in _heads(layer) if head not in DROPOUTS.values()]


def _set_adapter(
    wrapper: AdaptedLayer | SavedModule, adapter_names: str | Sequence[str], inference_mode: bool = False
) -> None:
    """Make adapters the active ones; as all layers of a model have one state, in all of them."""
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    set_active(wrapper.state, names)
    held = wrapper.adapters if isinstance(wrapper, AdaptedLayer) else wrapper.modules_to_save
    for key, part in held._modules.items():
        if part is not None:
            part.requires_grad_(slot_name(key) in names and not inference_mode)


def _enable_adapters(wrapper: AdaptedLayer | SavedModule, enabled: bool) -> None:
    """Switch adapters on or off; as all layers of a model have one state, in all of them."""
    switch(wrapper.state, enabled)


ATTRIBUTES: dict[str, Callable[[AdaptedLayer], Any]] = {
    "_all_available_adapter_names": lambda layer: lambda: sorted(adapters_in(layer)),
    "active_adapter": lambda layer: _one_or_all(active(layer.state)),
    "active_adapters": lambda layer: active(layer.state),
    "adapter_layer_names": _trained_heads,
    "disable_adapters": lambda layer: is_off(layer.state),
    "enable_adapters": lambda layer: partial(_enable_adapters, layer),
    "get_base_layer": lambda layer: lambda: layer.base_layer,
    "get_delta_weight": lambda layer: partial(_delta_weight, layer),
    "in_features": lambda layer: layer.kind.features(layer.base_layer)[1] // _positions(layer),
    "is_feedforward": _is_feedforward,
    "lora_alpha": lambda layer: _options(layer, "lora_alpha"),
    "merged_adapters": lambda layer: list(layer.merged),
    "other_param_names": lambda layer: ["scaling", "lora_alpha", "r"] if _is_lora(layer) else [],
    "out_features": lambda layer: layer.kind.features(layer.base_layer)[0],
    "parameter_name": _parameter_name,
    "quantization_backend": lambda layer: None if layer.storage.lossless else layer.storage.name,
    "r": _ranks,
    "scale_layer": lambda layer: partial(_scale_layer, layer),
    "scaling": Scaling,
    "set_adapter": lambda layer: partial(_set_adapter, layer),
    "set_scale": lambda layer: partial(_set_scale, layer),
    "supports_lora_conversion": lambda layer: partial(_supports_lora_conversion, layer),
    "unscale_layer": lambda layer: partial(_unscale_layer, layer),
    "use_dora": lambda layer: _options(layer, "use_dora"),
    "use_rslora": lambda layer: _options(layer, "use_rslora"),
}
MATRICES = ("vera_A", "vera_B")
MODEL_WIDE = ("unilora_theta_d", "vblora_vector_bank")
CONTAINERS = ("lora_", "vera_", "ia3_", "unilora_", "vblora_", "trained_bias")


def title(layer: AdaptedLayer) -> str:
    """The method and what it adapts, as PEFT calls its layers; ``adapted`` where adapters of several methods meet."""
    methods = {slot.method.name for slot in adapters_in(layer).values() if slot.method is not None}
    own = "ParamWrapper" if layer.kind.parameter is not None else type(layer.base_layer).__name__
    return f"{methods.pop() if len(methods) == 1 else 'adapted'}.{'Linear' if own == 'Conv1D' else own}"


@final
class _LayerShape(Outside):
    def title(self, wrapper: nn.Module) -> str:
        assert isinstance(wrapper, AdaptedLayer)
        backend = ATTRIBUTES["quantization_backend"](wrapper)
        return title(wrapper) if backend is None else f"{title(wrapper)}[quantization_backend={backend!r}]"

    def attribute(self, wrapper: nn.Module, name: str) -> Any:
        assert isinstance(wrapper, AdaptedLayer)
        if (found := ATTRIBUTES.get(name)) is not None:
            return found(wrapper)
        if name in MATRICES:
            return _matrices(wrapper, name)
        if name in MODEL_WIDE:
            return _model_wide(wrapper, name)
        if name.startswith(CONTAINERS) and (head := _heads(wrapper).get(name)) is not None:
            return head
        if name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", MAGNITUDE) and _is_lora(wrapper):
            return nn.ModuleDict()
        raise AttributeError(name)

    def parts(self, wrapper: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        assert isinstance(wrapper, AdaptedLayer)
        if (base := wrapper._modules.get("base_layer")) is not None:
            yield "base_layer", base
        yield from _heads(wrapper).items()

    def names(self, wrapper: nn.Module) -> Mapping[str, str]:
        assert isinstance(wrapper, AdaptedLayer)
        return {
            f"adapters.{key}.{name}": f"{head}.{key}.{rest}".removesuffix(".")
            for key, name, head, rest, _ in _shown(wrapper)
        }


def _matrices(layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
    """VeRA's matrices by adapter, cut to the layer: ``vera_A`` (r, in) or ``vera_B`` (out, r)."""
    found = {
        adapter: low_rank(slot)
        for adapter, slot in adapters_in(layer).items()
        if slot.method and slot.method.name == "vera"
    }
    if not found:
        raise AttributeError(name)
    return {adapter: delta.a if name == "vera_A" else delta.b for adapter, delta in found.items() if delta is not None}


def _model_wide(layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
    """What adapters train once for the whole model, by adapter; PEFT shows it in each layer too."""
    held = {adapter: slot.shared.trained for adapter, slot in adapters_in(layer).items()}
    if not (found := {adapter: own[name] for adapter, own in held.items() if name in own}):
        raise AttributeError(name)
    return dict(found)


def _is_lora(layer: AdaptedLayer) -> bool:
    return any(slot.method is not None and slot.method.name == "lora" for slot in adapters_in(layer).values())


def _load_map(saved: SavedModule, adapter_name: str) -> dict[str, str]:
    """Key of a module in a file -> its name in the wrapper."""
    key = slot_key(adapter_name)
    twin = saved.modules_to_save._modules.get(key)
    return {} if twin is None else {name: f"modules_to_save.{key}.{name}" for name in twin.state_dict()}


def _its_active(saved: SavedModule) -> list[str]:
    return [name for name in active(saved.state) if slot_key(name) in saved.modules_to_save]


SAVED_ATTRIBUTES: dict[str, Callable[[SavedModule], Any]] = {
    "_adapters": lambda saved: set(map(slot_name, saved.modules_to_save)),
    "adapter_layer_names": lambda saved: ["modules_to_save"],
    "adapter_state_dict_load_map": lambda saved: partial(_load_map, saved),
    "active_adapters": lambda saved: _its_active(saved),
    "active_adapter": lambda saved: _one_or_all(_its_active(saved)),
    "enable_adapters": lambda saved: partial(_enable_adapters, saved),
    "set_adapter": lambda saved: partial(_set_adapter, saved),
    "disable_adapters": lambda saved: is_off(saved.state),
}


@final
class _SavedShape(Outside):
    def title(self, wrapper: nn.Module) -> str:
        return "ModulesToSaveWrapper"

    def attribute(self, wrapper: nn.Module, name: str) -> Any:
        assert isinstance(wrapper, SavedModule)
        if (found := SAVED_ATTRIBUTES.get(name)) is not None:
            return found(wrapper)
        raise AttributeError(name)

    def parts(self, wrapper: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        yield from ((name, part) for name, part in wrapper._modules.items() if part is not None)

    def names(self, wrapper: nn.Module) -> Mapping[str, str]:
        return {}


@final
class _TunerShape(Outside):
    """Of a whole model with adapters: its vectors under the names that PEFT has for them."""

    def title(self, wrapper: nn.Module) -> str:
        return type(wrapper).__name__

    def attribute(self, wrapper: nn.Module, name: str) -> Any:
        raise AttributeError(name)

    def parts(self, wrapper: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        own = wrapper._modules
        yield from ((name, part) for name, part in own.items() if part is not None and name != "shared_parameters")
        found: dict[str, dict[str, tuple[nn.Module, str, nn.Parameter]]] = {}
        for key, name, parameter in _vectors(wrapper):
            held = cast(nn.Module, cast(nn.Module, own["shared_parameters"])._modules[key])
            found.setdefault(name, {})[key] = (held, name, parameter)
        yield from ((name, _Held(vectors)) for name, vectors in found.items())

    def names(self, wrapper: nn.Module) -> Mapping[str, str]:
        return {f"shared_parameters.{key}.{name}": f"{name}.{key}" for key, name, _ in _vectors(wrapper)}


def _vectors(tuner: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(adapter's key, name, parameter) of what adapters train once for a whole model."""
    for key, held in cast(nn.Module, tuner._modules["shared_parameters"])._modules.items():
        for name, parameter in () if held is None else held._parameters.items():
            if parameter is not None:
                yield key, name, parameter


TUNER: Outside = _TunerShape()
LAYER: Outside = _LayerShape()
SAVED: Outside = _SavedShape()
