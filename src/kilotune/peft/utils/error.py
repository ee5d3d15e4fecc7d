"""PEFT's errors, which are ours."""

from __future__ import annotations

from ...errors import KilotuneError as PeftError
from ...errors import TargetError as NoMatchingPeftModuleError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
