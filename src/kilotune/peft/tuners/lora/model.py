"""PEFT's LoraModel."""

from __future__ import annotations

from typing import final

from ..tuners_utils import BaseTuner

__all__ = ["LoraModel"]


@final
class LoraModel(BaseTuner):
    """A base model with adapters, the first of them Lora's; others may be of any method."""
