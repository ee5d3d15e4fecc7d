"""PEFT's names of methods and tasks."""

from __future__ import annotations

from enum import StrEnum
from typing import final

from ...config import TaskType

__all__ = ["PeftType", "TaskType"]


@final
class PeftType(StrEnum):
    """The methods that PEFT and kilotune both have, by the ``peft_type`` of their files."""

    LORA = "LORA"
    VERA = "VERA"
    IA3 = "IA3"
    UNILORA = "UNILORA"
    VBLORA = "VBLORA"
