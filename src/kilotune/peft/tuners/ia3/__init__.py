"""As ``peft.tuners.ia3``.

The method itself is in ``methods/ia3.py``; here are its options and its layers under PEFT's names.
"""

from .config import IA3Config
from .layer import IA3Layer
from .model import IA3Model

__all__ = ["IA3Config", "IA3Layer", "IA3Model"]
