"""As ``peft.tuners.lora``.

The method itself is in ``methods/lora.py``; here are its options and its layers under PEFT's names.
"""

from .config import EvaConfig, LoftQConfig, LoraConfig, LoraRuntimeConfig
from .conversion import convert_to_lora, save_as_lora
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .layer import Conv2d, Embedding, Linear, LoraLayer
from .model import LoraModel

__all__ = [
    "Conv2d",
    "Embedding",
    "EvaConfig",
    "Linear",
    "LoftQConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "convert_to_lora",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "save_as_lora",
]
