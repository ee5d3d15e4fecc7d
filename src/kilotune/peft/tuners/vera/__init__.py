"""As ``peft.tuners.vera``.

The method itself is in ``methods/vera.py``; here are its options and its layers under PEFT's names.
"""

from .config import VeraConfig
from .layer import VeraLayer
from .model import VeraModel

__all__ = ["VeraConfig", "VeraLayer", "VeraModel"]
