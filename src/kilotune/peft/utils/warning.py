"""PEFT's warning."""

from __future__ import annotations

from typing import final

__all__ = ["PeftWarning"]


@final
class PeftWarning(UserWarning):
    """What PEFT's users filter by this name: something went on other than it may have been meant."""
