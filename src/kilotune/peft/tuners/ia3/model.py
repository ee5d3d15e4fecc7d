"""PEFT's IA3Model."""

from __future__ import annotations

from typing import ClassVar, final

from ..tuners_utils import BaseTuner

__all__ = ["IA3Model"]


@final
class IA3Model(BaseTuner):
    """A base model with adapters, the first of them IA3's; others may be of any method."""

    prefix: ClassVar[str] = "ia3_"
