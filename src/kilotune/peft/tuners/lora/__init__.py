"""As ``peft.tuners.lora``."""

from .config import LoraConfig, LoraRuntimeConfig
from .layer import Conv2d, Embedding, Linear, LoraLayer
from .model import LoraModel

__all__ = ["Conv2d", "Embedding", "Linear", "LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
