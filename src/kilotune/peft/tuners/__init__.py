"""As ``peft.tuners``: the methods that PEFT and kilotune both have.

Begin in ``tuners_utils.py``: all of PEFT's models and layers are one there. A method has a folder, as in PEFT.
"""

from .ia3 import IA3Config, IA3Model
from .lora import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraModel,
    LoraRuntimeConfig,
    convert_to_lora,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    save_as_lora,
)
from .unilora import UniLoraConfig, UniLoraModel
from .vblora import VBLoRAConfig, VBLoRAModel
from .vera import VeraConfig, VeraModel

__all__ = [
    "EvaConfig",
    "IA3Config",
    "IA3Model",
    "LoftQConfig",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "UniLoraConfig",
    "UniLoraModel",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeraConfig",
    "VeraModel",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "save_as_lora",
]
