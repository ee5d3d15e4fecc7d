"""As ``peft.tuners``: the methods that PEFT and kilotune both have."""

from .ia3 import IA3Config, IA3Model
from .lora import (
    EvaConfig,
    LoraConfig,
    LoraModel,
    LoraRuntimeConfig,
    get_eva_state_dict,
    initialize_lora_eva_weights,
)
from .unilora import UniLoraConfig, UniLoraModel
from .vera import VeraConfig, VeraModel

__all__ = [
    "EvaConfig",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "UniLoraConfig",
    "UniLoraModel",
    "VeraConfig",
    "VeraModel",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
]
