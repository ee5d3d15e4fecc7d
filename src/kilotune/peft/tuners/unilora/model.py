"""PEFT's UniLoraModel."""

from __future__ import annotations

from typing import ClassVar, final

from ..tuners_utils import BaseTuner

__all__ = ["UniLoraModel"]


@final
class UniLoraModel(BaseTuner):
    """A base model with adapters, the first of them UniLora's; others may be of any method."""

    prefix: ClassVar[str] = "unilora_"
