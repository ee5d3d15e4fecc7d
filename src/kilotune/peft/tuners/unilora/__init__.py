"""As ``peft.tuners.unilora``."""

from .config import UniLoraConfig
from .layer import UniLoraLayer
from .model import UniLoraModel

__all__ = ["UniLoraConfig", "UniLoraLayer", "UniLoraModel"]
