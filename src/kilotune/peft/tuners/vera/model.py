"""PEFT's VeraModel."""

from __future__ import annotations

from typing import ClassVar, final

from ..tuners_utils import BaseTuner

__all__ = ["VeraModel"]


@final
class VeraModel(BaseTuner):
    """A base model with adapters, the first of them Vera's; others may be of any method."""

    prefix: ClassVar[str] = "vera_lambda_"
