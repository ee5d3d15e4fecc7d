"""As ``peft.tuners.lora.eva``: LoRA that starts with what its layers' inputs vary in."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ....adapter_files.peft_layout import PREFIX
from ....convert import exact_targets
from ....errors import AdapterError, ConfigError, UnsupportedError
from ....injection.inject import plan
from ....kinds import LayerKind
from ....methods.lora import Lora
from ....model.explained_variance import Component, Watched, explained
from ..inside import tuner_in
from ..tuners_utils import BaseTuner
from .config import EvaConfig, LoraConfig

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
]

Rows = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a batch that is a dictionary of the model's arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The places (n, 2) of a batch that count: no padding, and no labels that are masked out."""
    if not isinstance(model_input, Mapping):
        raise ConfigError("a batch that is no dictionary needs a prepare_model_inputs_fn of its own, or None")
    settings = _settings(peft_config)
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows (n, features) of an input (batch, tokens, features) at the places ``model_input`` (n, 2)."""
    return _tensor(layer_input, layer_name)[model_input[:, 0], model_input[:, 1]]


def _flat(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    found = _tensor(layer_input, layer_name)
    return found.reshape(-1, found.shape[-1])


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(found, Tensor):
        raise ConfigError(f"{layer_name}: its input is a {type(found).__name__}; give a prepare_layer_inputs_fn for it")
    return found


def _config_of(tuner: BaseTuner, adapter_name: str) -> LoraConfig:
    found = tuner.peft_config[adapter_name]
    if not isinstance(found, LoraConfig) or found.use_dora:
        raise ConfigError(f"adapter {adapter_name!r}: EVA starts a plain LoRA, without DoRA")
    return found


def _settings(config: LoraConfig) -> EvaConfig:
    return config.eva_config if isinstance(config.eva_config, EvaConfig) else EvaConfig()


# -- what the inputs vary in -------------------------------------------------------------------------------


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Rows | Mapping[str, Rows] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The factor A (rank, in) of each layer by EVA, by the layer's name in ``model``; a layer may get no rank.

    Args:
        model: with an adapter in it, whose layers are meant, or a base.
        dataloader: batches, run through as often as is needed.
        peft_config: which layers of a base, and their ranks; by default the adapter's.
        forward_fn: (model, batch) runs the model.
        prepare_model_inputs_fn: (batch, config) -> what ``prepare_layer_inputs_fn`` is told; None: the batch.
        prepare_layer_inputs_fn: (inputs of a layer, that, name) -> the rows (n, in) that count, or such functions by
            name; None: all.
        adapter_name: which adapter.
        gather_distributed_inputs: False in a program of several processes, which do not wait for one another here.
        show_progress_bar: as in PEFT; there is none.

    Raises:
        ConfigError: no batches, too few inputs in each, or no configuration.
        UnsupportedError: several processes.

    """
    if dist.is_initialized() and gather_distributed_inputs and dist.get_world_size() > 1:
        raise UnsupportedError(
            "EVA over several processes: make the state in one with gather_distributed_inputs=False, and hand it to "
            "all as eva_state_dict"
        )
    with_adapter = hasattr(model, "peft_config")
    if peft_config is None:
        if not with_adapter:
            raise ConfigError("peft_config: which layers of a model without adapters are meant")
        peft_config = _config_of(tuner_in(model), adapter_name)
    settings = _settings(peft_config)
    layers = _adapted(model, adapter_name) if with_adapter else _targets(model, peft_config)
    given = dict(prepare_layer_inputs_fn) if isinstance(prepare_layer_inputs_fn, Mapping) else {}
    if unknown := [name for name in given if name not in layers]:
        raise ConfigError(f"prepare_layer_inputs_fn: there are no layers {', '.join(unknown)}")
    every = _flat if prepare_layer_inputs_fn is None or given else prepare_layer_inputs_fn
    assert callable(every)
    told: list[Any] = [None]

    def run(batch: Any) -> None:
        batch = _moved(batch, _device(model))
        told[0] = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, peft_config)
        forward_fn(model, batch)

    def rows(name: str, inputs: tuple[Any, ...], batch: Any) -> Tensor:
        return given.get(name, every)(inputs, told[0], name)

    training = model.training
    model.eval()
    try:
        if with_adapter:
            with model.disable_adapter():  # type: ignore[operator]
                found = explained(layers, dataloader, run, rows, settings.rho, settings.tau)
        else:
            found = explained(layers, dataloader, run, rows, settings.rho, settings.tau)
    finally:
        model.train(training)
    return {name: _factor(component, settings) for name, component in found.items()}


def _factor(component: Component, settings: EvaConfig) -> Tensor:
    if not settings.whiten:
        return component.vectors
    return component.vectors / component.values.sqrt().unsqueeze(-1)


def _device(model: nn.Module) -> torch.device | None:
    devices = {p.device for p in model.parameters() if p.device.type != "meta"}
    return devices.pop() if len(devices) == 1 else None


def _moved(batch: Any, device: torch.device | None) -> Any:
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _multiplies(kind: LayerKind) -> bool:
    """Whether it is a product with the rows of its input: a linear layer or a Conv1D."""
    return kind.all_linear and not kind.substitutes and kind.parameter is None


def _adapted(model: nn.Module, adapter_name: str) -> dict[str, Watched]:
    installed = tuner_in(model).installed(adapter_name)
    method = installed.method
    assert isinstance(method, Lora)
    found = {}
    for name, slot in installed.slots().items():
        layer = installed.layers[name]
        if slot.method is not None and _multiplies(layer.kind):
            found[f"{PREFIX}{name}"] = Watched(layer, method.rank(slot.site), slot.site.inn)
    return found


def _targets(model: nn.Module, config: LoraConfig) -> dict[str, Watched]:
    made = plan(model, "default", config.translated())
    found = {}
    for name, candidate in made.layers.items():
        kind = candidate.kind
        if kind is not None and _multiplies(kind):
            rank, inn = made.shapes[name]["lora_A"]
            found[name] = Watched(candidate.module, rank, inn)
    return found


# -- into the adapter ----------------------------------------------------------------------------------------


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Rows | Mapping[str, Rows] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Start an adapter with init_lora_weights='eva' anew, A by EVA and B zero; see :func:`get_eva_state_dict`.

    Its parameters are new ones, of new ranks, so an optimizer is made afterwards. A layer that gets no rank has no
    adapter any more. Layers that are not in the state (embeddings, convolutions) start as always, with a warning.

    Raises:
        ConfigError: neither batches nor a state, another start, or shapes that do not fit.
        AdapterError: other adapters are active, or this one is merged.

    """
    if not hasattr(model, "peft_config"):
        raise ConfigError("EVA starts an adapter that is in a model: give what get_peft_model gave")
    tuner = tuner_in(model)
    config = _config_of(tuner, adapter_name)
    if config.init_lora_weights != "eva":
        raise ConfigError(f"adapter {adapter_name!r}: EVA needs LoraConfig(init_lora_weights='eva')")
    if tuner.active_adapters != [adapter_name]:
        raise AdapterError(f"EVA: only {adapter_name!r} may be active, and {tuner.active_adapters} are")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("EVA needs a dataloader, or an eva_state_dict that was made before")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    _start(tuner, adapter_name, config, {key.removeprefix(PREFIX): value for key, value in eva_state_dict.items()})


@torch.no_grad()
def _start(tuner: BaseTuner, adapter_name: str, config: LoraConfig, state: Mapping[str, Tensor]) -> None:
    installed = tuner.installed(adapter_name)
    method = installed.method
    assert isinstance(method, Lora)
    sites = {name: slot.site for name, slot in installed.slots().items() if slot.method is not None}
    wrong = [name for name, value in state.items() if name not in sites or value.shape[-1] != sites[name].inn]
    if wrong:
        raise ConfigError(f"eva_state_dict: the adapter has no layers of such shapes: {', '.join(wrong)}")
    ranks, alphas = {}, {}
    for name, site in sites.items():
        rank = old = method.rank(site)
        alpha = method.scale(site) * (math.sqrt(old) if config.use_rslora else old)
        if name in state and (rank := state[name].shape[0]) != old and _settings(config).adjust_scaling_factors:
            alpha *= rank / old
        ranks[name], alphas[name] = rank, alpha
    kept = [name for name in sites if ranks[name]]
    targets = exact_targets(tuner, kept)
    changed = config.copy(
        target_modules=targets if isinstance(targets, str) else set(targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={name: ranks[name] for name in kept if ranks[name] != config.r},
        alpha_pattern={name: alphas[name] for name in kept if not math.isclose(alphas[name], config.lora_alpha)},
    )
    train = any(parameter.requires_grad for _, parameter in installed.parameters())
    tuner._remove(adapter_name)
    tuner.inject(adapter_name, changed)
    tuner.set_adapter(adapter_name, inference_mode=not train)
    for name, slot in tuner.installed(adapter_name).slots().items():
        if name in state and slot.method is not None:
            slot.own()["lora_A"].copy_(state[name])
    if missing := [name for name in kept if name not in state]:
        warnings.warn(f"EVA: not in its state, so they start as with True: {', '.join(missing)}", stacklevel=3)
