"""Another LoRA adapter's numbers in the place of one that is in a model, while what was compiled stays.

What a compiled forward reads must stay what it is: the parameters, and their shapes. So another adapter's numbers are
copied into them, with zeros beside them where its rank is lower; after :func:`prepare_model_for_compiled_hotswap` its
scale is in a tensor as well. ``Installed.config`` always says what the parameters are (rank R, alpha so that the scale
is right), so that what is saved loads again.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...adapter_files.files import TwoFiles
from ...adapter_files.fitting import match_tensors, wanted_of
from ...adapter_files.peft_layout import PREFIX
from ...adapter_files.reading import parse
from ...adapter_files.writing import bias_place
from ...errors import AdapterError, ConfigError, check_one_of, type_name
from ...injection import inject
from ...injection.installed_adapter import Installed
from ...kernels.lowrank import accumulate_dtype
from ...layers.slot import BIAS, Slot
from ...methods import LoraConfig as OurConfig
from ...methods import Method, make_method
from ...methods.lora import Lora
from ..config import PeftConfig
from ..layer_shape import key_in_layer
from ..peft_model import HUB, opened
from ..tuners.inside import tuner_in
from ..tuners.lora.config import LoraConfig
from ..tuners.tuners_utils import BaseTuner
from .peft_types import PeftType
from .save_and_load import lora_of

__all__ = [
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
]

CONFIG_KEYS_TO_CHECK: Mapping[str, list[str]] = {
    PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]
}
CHECKS = ("error", "warn", "ignore")
Places = Mapping[str, str]
"""A key of a model's state, without the prefix -> the key in a file."""


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | os.PathLike[str],
    adapter_name: str,
    torch_device: str | None = None,
    **kwargs: Any,
) -> None:
    """Replace a LoRA adapter's numbers by those of another one's files; its name stays.

    Layers that the new one does not change are not changed any more. Ranks and alphas may differ.

    Args:
        model: a PeftModel, compiled or not.
        model_name_or_path: a folder or a hub id.
        adapter_name: the adapter whose place is taken.
        torch_device: as in PEFT; the numbers go to where their layers are.
        kwargs: revision, subfolder, token, cache_dir, local_files_only, key_mapping.

    Raises:
        ConfigError: another method than LoRA, or options that do not go together.
        CheckpointError: the files are damaged or unsafe, or do not fit.
        RuntimeError: they change what the adapter that is there does not. In all cases nothing is changed.

    """
    key_mapping = kwargs.pop("key_mapping", None)
    known = PeftConfig.from_pretrained(model_name_or_path, **{key: kwargs[key] for key in HUB if key in kwargs})
    tuner = tuner_in(model)
    tuner.installed(adapter_name)  # an unknown name is told first
    check_hotswap_configs_compatible(tuner.peft_config[adapter_name], known)
    file = opened(model_name_or_path, None, key_mapping, kwargs)
    _swap(tuner, adapter_name, file.tensors, cast(LoraConfig, known), _keys(tuner, adapter_name), file.doubled)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: PeftConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace a LoRA adapter's numbers by those of a state whose keys have the adapter's name in them.

    Args:
        model: a PeftModel, or a base into which adapters were injected; compiled or not.
        state_dict: ``<layer>.lora_A.<adapter>.weight`` and so on, with the model's prefix or without.
        adapter_name: the adapter whose place is taken.
        config: of the new one: its ranks and alphas.
        parameter_prefix: "lora_", for no other method can be replaced.

    Raises:
        ConfigError, CheckpointError, RuntimeError: as :func:`hotswap_adapter`.

    """
    check_one_of("parameter_prefix", parameter_prefix, ["lora_"])
    if not isinstance(config, LoraConfig):
        if _type_of(config) == PeftType.LORA:
            raise ConfigError(f"config: expected a configuration of kilotune.peft, got {type_name(config)}")
        raise ConfigError(f"Hotswapping only supports LORA but {_type_of(config)} was passed.")
    tuner = tuner_in(model)
    places = _places(tuner, adapter_name)
    _swap(tuner, adapter_name, {key.removeprefix(PREFIX): v for key, v in state_dict.items()}, config, places)


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Refuse two configurations of which one's adapter cannot take the place of the other's.

    Raises:
        ConfigError: they are not both LoRA's, or an option differs that has to be the same.

    """
    one, other = _type_of(config0), _type_of(config1)
    if one != other:
        raise ConfigError(f"Incompatible PEFT types found: {one} and {other}")
    if one not in CONFIG_KEYS_TO_CHECK:
        raise ConfigError(f"Hotswapping only supports {', '.join(CONFIG_KEYS_TO_CHECK)} but {one} was passed.")
    for key in CONFIG_KEYS_TO_CHECK[one]:
        if (here := getattr(config0, key, None)) != (there := getattr(config1, key, None)):
            raise ConfigError(f"Configs are incompatible: for {key}, {here} != {there}")


@torch.no_grad()
def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: PeftConfig | Mapping[str, PeftConfig] | None = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Let the LoRA adapters of a model be replaced by ones of other ranks and alphas, without compiling anew.

    To be called with the first adapter in the model, before it is compiled. What the model gives stays the same.

    Args:
        model: a PeftModel, or a base into which adapters were injected; changed in place.
        target_rank: the largest rank that will come; what is there gets zeros up to it. None: ranks stay.
        config: configurations whose ranks are set to ``target_rank``, as in PEFT.
        check_compiled: what to do where the model is compiled already.

    Raises:
        ConfigError: no LoRA adapter, a rank below one that is there, a compiled model. Nothing is changed then.

    """
    _check_compiled(model, check_compiled)
    installed = _lora_adapters(model)
    if target_rank is not None:
        _check_target_rank(installed, target_rank)
    for adapter in installed:
        scales = {name: _scale(slot) for name, slot in _slots(adapter).items()}
        strengths = {name: _strength(slot) for name, slot in _slots(adapter).items()}
        for slot in _slots(adapter).values() if target_rank is not None else ():
            for key, parameter in slot.own().items():
                _put(slot, key, parameter, parameter, target_rank)
        _tell(adapter, scales)
        for name, slot in _slots(adapter).items():
            slot.method = _unit(adapter, slot)
            slot.said = scales[name]
            slot.strength = torch.tensor(
                strengths[name] * scales[name],
                dtype=accumulate_dtype(slot.own()["lora_A"].dtype),
                device=slot.own()["lora_A"].device,
            )
    if target_rank is not None and config:
        for each in config.values() if isinstance(config, Mapping) else (config,):
            each.r = target_rank  # type: ignore[attr-defined]
            each.rank_pattern = dict.fromkeys(each.rank_pattern or (), target_rank)  # type: ignore[attr-defined]


# -- what is refused -------------------------------------------------------------------------------


def _type_of(config: Any) -> str:
    return str(getattr(config, "peft_type", type(config).__name__))


def _check_compiled(model: nn.Module, check_compiled: str) -> None:
    if check_compiled not in CHECKS:
        raise ConfigError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None)):
        return
    if check_compiled == "error":
        raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if check_compiled == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled: it will probably be "
            "compiled again. Call it before.",
            stacklevel=3,
        )


def _lora_adapters(model: nn.Module) -> list[Installed]:
    try:
        tuner = tuner_in(model)
    except AdapterError:
        found = []
    else:
        found = [one for name in tuner.peft_config if isinstance((one := tuner.installed(name)).config, OurConfig)]
        for one in found:
            _check_idle(one)
            if one.config.from_base:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"adapter {one.adapter!r} starts with a part of the base's weights, of its rank and alpha; "
                    "prepare a model with a LoRA adapter of another init_lora_weights"
                )
    if not found:
        raise ConfigError(
            "No adapter layers found on the model, of LoRA; call `prepare_model_for_compiled_hotswap` after loading "
            "the first adapter and before loading the second adapter."
        )
    return found


def _check_target_rank(adapters: list[Installed], target_rank: int) -> None:
    if isinstance(target_rank, bool) or not isinstance(target_rank, int) or target_rank < 1:
        raise ConfigError(f"target_rank: expected a whole number >= 1, got {target_rank!r}")
    for adapter in adapters:
        for name, slot in _slots(adapter).items():
            layer = adapter.layers[name]
            groups = layer.kind.groups(layer.base_layer)
            if target_rank % groups:
                raise ConfigError(
                    f"Trying to pad a {type(layer.base_layer).__name__} LoRA adapter with groups={groups} to target "
                    f"rank {target_rank}, but the target rank is not divisible by {groups}. Please choose a target "
                    f"rank that is divisible by {groups}."
                )
            if (rank := _rank(slot)) > target_rank:
                raise ConfigError(
                    f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
                    f"({rank}). This is not possible."
                )


def _check_starts(old: OurConfig, asked: OurConfig, new: OurConfig) -> None:
    """An adapter that is the difference from a start of the base's makes way for ones with the same start alone."""
    if not (old.from_base or new.from_base):
        return
    if old.init_lora_weights != new.init_lora_weights or asked != old:
        raise ConfigError(
            f"Configs are incompatible: init_lora_weights={old.init_lora_weights!r} and {new.init_lora_weights!r}; "
            "what starts with a part of the base's weights is replaced by ones of the same start, rank and alpha only"
        )


def _check_idle(installed: Installed) -> None:
    if any(layer.state.open_routes() for layer in installed.layers.values()):
        raise AdapterError("an adapter cannot be replaced while a route is open; leave its context first")


def _check_unmerged(installed: Installed) -> None:
    if any(installed.adapter in layer.merged for layer in installed.layers.values()):
        raise AdapterError(
            f"Cannot hot-swap adapter '{installed.adapter}' because it is currently merged into the base weights. "
            "Please unmerge it first, with `unmerge_adapter()`."
        )


# -- an adapter as it is ---------------------------------------------------------------------------


def _slots(installed: Installed) -> dict[str, Slot]:
    """The layers that the method itself adapts."""
    return {name: slot for name, slot in installed.slots().items() if slot.method is not None}


def _rank(slot: Slot) -> int:
    return slot.own()["lora_A"].shape[-2]


def _lora(method: Method[Any] | None) -> Lora:
    inner = None if method is None else lora_of(method)
    assert inner is not None
    return inner


def _scale(slot: Slot) -> float:
    """What the adapter's options make of alpha and rank."""
    return slot.said if isinstance(slot.strength, Tensor) else _lora(slot.method).scale(slot.site)


def _strength(slot: Slot) -> float:
    """How much stronger than its options say it acts."""
    if not isinstance(slot.strength, Tensor):
        return slot.strength
    return float(slot.strength) / slot.said if slot.said else 1.0


def _unit(installed: Installed, slot: Slot) -> Method[Any]:
    """The adapter's method with a scale of 1 at a slot's rank."""
    rank = _rank(slot)
    alpha = math.sqrt(rank) if installed.config.use_rslora else rank  # type: ignore[attr-defined]
    return make_method(installed.config.replace(r=rank, lora_alpha=alpha, rank_pattern={}, alpha_pattern={}))


def _tell(installed: Installed, scales: Mapping[str, float]) -> None:
    """Let an adapter's configuration say what its parameters are: their ranks, and alphas that make these scales."""
    ranks = {name: _rank(slot) for name, slot in _slots(installed).items()}
    config = cast(OurConfig, installed.config)
    method = _lora(make_method(config))
    sites = {name: slot.site for name, slot in _slots(installed).items()}
    if any(method.rank(site) != ranks[name] or method.scale(site) != scales[name] for name, site in sites.items()):
        alphas = {name: scales[name] * (math.sqrt(rank) if config.use_rslora else rank) for name, rank in ranks.items()}
        config = config.replace(
            r=_common(ranks),
            lora_alpha=_common(alphas),
            rank_pattern=_others(sites, ranks),
            alpha_pattern=_others(sites, alphas),
        )
    if config != installed.config:
        installed.config, installed.method = config, make_method(config)


def _common(values: Mapping[str, Any]) -> Any:
    found = list(values.values())
    return max(found, key=found.count)


def _others(sites: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Whole names of layers -> their values, of those that have not the common one."""
    usual = _common(values)
    return {f"^{sites[name].pattern_name}": value for name, value in values.items() if value != usual}


# -- keys ------------------------------------------------------------------------------------------


def _keys(tuner: BaseTuner, adapter_name: str) -> Places:
    """The keys of an adapter in a file, each for itself."""
    return {key: key for key in _places(tuner, adapter_name).values()}


def _places(tuner: BaseTuner, adapter_name: str) -> Places:
    """All keys under which an adapter's tensors may come."""
    installed = tuner.installed(adapter_name)
    _lora_or_refused(installed)
    made = inject.plan(tuner.model, adapter_name, installed.config, strict=False)
    files = {target: key for key, (target, _) in wanted_of(made).items()}
    found: dict[str, str] = {}
    for name, slot in installed.slots().items():
        for own in slot.values():
            key = files[f"{name}.{own}"]
            head, rest = key_in_layer(installed.layers[name], slot, own)
            found[f"{name}.{head}.{adapter_name}.{rest}".removesuffix(".")] = key
            found[f"{name}.base_layer.weight"] = f"{name}.base_layer.weight"  # PEFT writes an embedding's
            if own == BIAS:
                found[bias_place(name, installed).removeprefix(PREFIX)] = key
    for name, saved in installed.saved.items():
        for key in saved.modules_to_save[installed.key].state_dict():
            found[f"{name}.{key}"] = found[f"{name}.modules_to_save.{adapter_name}.{key}"] = f"{name}.{key}"
    return found


def _lora_or_refused(installed: Installed) -> None:
    if not isinstance(installed.config, OurConfig):
        raise ConfigError(f"Hotswapping only supports LORA but {installed.config.peft_type} was passed.")


# -- the swap --------------------------------------------------------------------------------------


@torch.no_grad()
def _swap(
    tuner: BaseTuner,
    adapter_name: str,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    places: Places,
    doubled: bool | None = False,
) -> None:
    """Check everything, and then put the tensors (keys without prefix) where ``places`` says."""
    installed = tuner.installed(adapter_name)
    _check_idle(installed)
    _check_unmerged(installed)
    if unexpected := [key for key in tensors if key not in places]:
        shown = ", ".join(_with_name(key, adapter_name) for key in unexpected)
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {shown}.")
    new = cast(OurConfig, config.translated())
    asked = cast(OurConfig, installed.config).replace(
        r=new.r,
        lora_alpha=new.lora_alpha,
        rank_pattern=new.rank_pattern,
        alpha_pattern=new.alpha_pattern,
        use_rslora=new.use_rslora,
    )
    if new.use_dora != asked.use_dora:
        raise ConfigError(f"Configs are incompatible: for use_dora, {asked.use_dora} != {new.use_dora}")
    _check_starts(cast(OurConfig, installed.config), asked, new)
    given = {places[key]: value for key, value in tensors.items()}
    asked = _no_larger(tuner, installed, asked, given)
    values = _matched(tuner, installed, asked, given, doubled)
    method = _lora(make_method(asked))
    scales = {name: method.scale(slot.site) for name, slot in _slots(installed).items()}
    for name, slot in installed.slots().items():
        for key in slot.values():
            _put(slot, key, slot.get_parameter(key), values[f"{name}.{key}"])
    for name, saved in installed.saved.items():
        twin = saved.modules_to_save[installed.key]
        twin.load_state_dict({key: values[f"{name}.{key}"] for key in twin.state_dict()})
    before, installed.config = installed.config, asked
    _tell(installed, scales)
    changed = installed.config != before
    if changed:
        installed.method = make_method(installed.config)
    for name, slot in _slots(installed).items():
        if isinstance(slot.strength, Tensor):
            slot.said = scales[name]
            slot.strength.fill_(scales[name])
            slot.method = slot.method if _lora(slot.method).rank(slot.site) == _rank(slot) else _unit(installed, slot)
        else:
            slot.strength = 1.0
            slot.method = installed.method if changed else slot.method  # what is the same is not compiled anew


def _no_larger(tuner: BaseTuner, installed: Installed, asked: OurConfig, given: Mapping[str, Tensor]) -> OurConfig:
    """The options, with the rank that is there for layers whose factors do not come: a file may say any rank."""
    method = _lora(make_method(asked))
    sites = {name: slot.site for name, slot in _slots(installed).items()}
    larger = {name for name, slot in _slots(installed).items() if method.rank(sites[name]) > _rank(slot)}
    wanted = wanted_of(inject.plan(tuner.model, installed.adapter, asked, strict=False)) if larger else {}
    absent = {target.rpartition(".")[0] for key, (target, _) in wanted.items() if key not in given}
    ranks = {f"^{sites[name].pattern_name}": _rank(_slots(installed)[name]) for name in sorted(larger & absent)}
    return asked.replace(rank_pattern={**ranks, **asked.rank_pattern}) if ranks else asked


def _with_name(key: str, adapter_name: str) -> str:
    """A file's key as PEFT shows it, with the adapter's name in it."""
    head, dot, last = key.rpartition(".")
    named = f"{head}.{adapter_name}{dot}{last}" if ".lora_" in key and f".{adapter_name}." not in key else key
    return f"{PREFIX}{named}"


def _matched(
    tuner: BaseTuner, installed: Installed, asked: OurConfig, given: Mapping[str, Tensor], doubled: bool | None
) -> dict[str, Tensor]:
    """The tensors by ``<layer>.<parameter>``, in our form and of the new ranks; zeros for layers that get none.

    Raises:
        RuntimeError: biases or whole modules are missing, for which zeros would not do.
        CheckpointError: shapes that are not of the configuration's ranks, values that are not finite.

    """
    made = inject.plan(tuner.model, installed.adapter, asked, strict=False)
    wanted = wanted_of(made)
    heads = [f"{n}.{key}" for n, s in installed.saved.items() for key in s.modules_to_save[installed.key].state_dict()]
    needed = [*(key for key, (target, _) in wanted.items() if target.endswith(f".{BIAS}")), *heads]
    if asked.use_dora:
        needed = [*wanted, *heads]  # a magnitude of zeros would switch the layer itself off
    if missing := [key for key in needed if key not in given]:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, missing keys found: {', '.join(missing)}.")
    filled = {**{key: torch.zeros(shape) for key, (_, shape) in wanted.items() if key not in given}, **given}
    tensors = {f"{PREFIX}{key}": value.detach().cpu() for key, value in filled.items()}
    file = parse(TwoFiles(Path(installed.adapter), asked.to_dict(), tensors, {"kilotune_format": "1"}))
    return match_tensors(replace(file, doubled=doubled), made, type(tuner.model).__name__)


def _put(slot: Slot, key: str, parameter: nn.Parameter, value: Tensor, rank: int | None = None) -> None:
    """Write a value into a parameter of a slot, with zeros beside it where its rank is lower than that there.

    Where it is higher, or ``rank`` asks for that, a new parameter takes the place.
    """
    shape = list(parameter.shape)
    if (axis := {"lora_A": -2, "lora_B": -1}.get(key)) is not None:
        shape[axis] = max(shape[axis], value.shape[axis], rank or 0)
    if list(parameter.shape) == shape == list(value.shape) and not parameter.is_meta:
        parameter.copy_(value)
        return
    device = slot.site.device() if parameter.is_meta else parameter.device
    whole = torch.zeros(shape, dtype=parameter.dtype, device=device)
    whole[tuple(slice(0, size) for size in value.shape)] = value.to(device, parameter.dtype)
    if list(parameter.shape) == shape and not parameter.is_meta:
        parameter.copy_(whole)
    else:
        setattr(slot, key, nn.Parameter(whole, requires_grad=parameter.requires_grad))
