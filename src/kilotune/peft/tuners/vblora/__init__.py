"""As ``peft.tuners.vblora``.

The method itself is in ``methods/vblora.py``; here are its options and its layers under PEFT's names.
"""

from .config import VBLoRAConfig
from .layer import VBLoRALayer
from .model import VBLoRAModel

__all__ = ["VBLoRAConfig", "VBLoRALayer", "VBLoRAModel"]
