"""As ``peft.tuners.unilora``.

The method itself is in ``methods/unilora.py``; here are its options and its layers under PEFT's names.
"""

from .config import UniLoraConfig
from .layer import UniLoraLayer
from .model import UniLoraModel

__all__ = ["UniLoraConfig", "UniLoraLayer", "UniLoraModel"]
