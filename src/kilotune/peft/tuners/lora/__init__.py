"""As ``peft.tuners.lora``."""

from .config import EvaConfig, LoraConfig, LoraRuntimeConfig
from .eva import get_eva_state_dict, initialize_lora_eva_weights
from .layer import Conv2d, Embedding, Linear, LoraLayer
from .model import LoraModel

__all__ = [
    "Conv2d",
    "Embedding",
    "EvaConfig",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
]
