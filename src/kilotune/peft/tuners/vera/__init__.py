"""As ``peft.tuners.vera``."""

from .config import VeraConfig
from .layer import VeraLayer
from .model import VeraModel

__all__ = ["VeraConfig", "VeraLayer", "VeraModel"]
