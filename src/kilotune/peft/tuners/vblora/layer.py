"""PEFT's VBLoRALayer, to ask what a module is. None is made of it."""

from __future__ import annotations

from typing import ClassVar, final

from ..tuners_utils import BaseTunerLayer

__all__ = ["VBLoRALayer"]


@final
class VBLoRALayer(BaseTunerLayer):
    """A layer with such an adapter."""

    method: ClassVar[str] = "vblora"
