"""PEFT's IA3Layer, to ask what a module is. None is made of it."""

from __future__ import annotations

from typing import ClassVar, final

from ..tuners_utils import BaseTunerLayer

__all__ = ["IA3Layer"]


@final
class IA3Layer(BaseTunerLayer):
    """A layer with such an adapter."""

    method: ClassVar[str] = "ia3"
