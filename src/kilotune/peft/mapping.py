"""What PEFT keeps in ``peft.mapping``: which classes a method has, and adapters without a model around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..adapter_files.writing import DEFAULT
from ..candidates import matches_names
from ..errors import ConfigError
from .config import CONFIGS, PeftConfig
from .tuners.inside import INJECTED
from .tuners.mixed import TUNERS, tuner_of
from .tuners.tuners_utils import BaseTuner

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]

PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[str, type[PeftConfig]] = CONFIGS
PEFT_TYPE_TO_TUNER_MAPPING: Mapping[str, type[BaseTuner]] = TUNERS
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: Mapping[str, type[BaseTuner]] = TUNERS
PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[str, str] = {
    "LORA": "lora_",
    "VERA": "vera_lambda_",
    "IA3": "ia3_",
    "UNILORA": "unilora_",
    "VBLORA": "vblora_",
}


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration of a dictionary with ``peft_type``."""
    return PeftConfig.from_peft_type(**config_dict)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = DEFAULT,
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put an adapter into a model, and give back the model itself: no object is around it.

    A second one goes into the same model; the new one is the active one.

    Args:
        peft_config: of the adapter.
        model: any module; changed in place, its weights frozen.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: without numbers, on the meta device, until the adapter is loaded.
        state_dict: the adapter's tensors, whose keys say which layers it is in, in place of the targets.

    """
    if state_dict is not None:
        peft_config = _of_state(peft_config, sorted(_layers_of(state_dict)))
    held = model.__dict__.get(INJECTED)
    if held is None:
        held = tuner_of(peft_config)(model, peft_config, adapter_name, low_cpu_mem_usage)
        model.__dict__[INJECTED] = held
        model.peft_config = held.peft_config  # type: ignore[assignment]  # where transformers and PEFT look for it
    else:
        held.inject(adapter_name, peft_config, low_cpu_mem_usage)
        held._activate((adapter_name,), train=not peft_config.inference_mode)
    return model


def _of_state(config: PeftConfig, layers: list[str]) -> PeftConfig:
    """A configuration for the layers that a state has."""
    if getattr(config, "target_parameters", None):
        raise ConfigError("state_dict: its keys do not tell parameters of modules from layers; leave it out here")
    changes: dict[str, Any] = {"target_modules": layers}
    if (forward := getattr(config, "feedforward_modules", None)) is not None:
        names = forward if isinstance(forward, str) else sorted(forward)
        changes["feedforward_modules"] = [name for name in layers if matches_names(names, name, "feedforward_modules")]
    return config.copy(**changes)


def _layers_of(state_dict: Mapping[str, Tensor]) -> set[str]:
    """The names of the layers that an adapter's keys are of."""
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    found = set()
    for key in state_dict:
        parts = key.removeprefix("base_model.model.").split(".")
        at = next((i for i, part in enumerate(parts) if part.startswith(prefixes)), None)
        if at:
            found.add(".".join(parts[:at]))
    return found
