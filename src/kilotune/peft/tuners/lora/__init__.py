"""As ``peft.tuners.lora``.

The method itself is in ``methods/lora.py``; here are its options and its layers under PEFT's names.
"""

from .config import LoraConfig, LoraRuntimeConfig
from .conversion import convert_to_lora, save_as_lora
from .layer import Conv2d, Embedding, Linear, LoraLayer
from .model import LoraModel

__all__ = [
    "Conv2d",
    "Embedding",
    "Linear",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "convert_to_lora",
    "save_as_lora",
]
