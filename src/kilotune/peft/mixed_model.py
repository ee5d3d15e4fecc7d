"""PEFT's PeftMixedModel: adapters of several methods, several of them active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from .peft_model import PeftModel

__all__ = ["PeftMixedModel"]


@final
class PeftMixedModel(PeftModel):
    """A model with adapters of several methods. Any PeftModel may be here; this is the one that PEFT calls so."""

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter, or several."""
        for name in [adapter_name] if isinstance(adapter_name, str) else list(adapter_name):
            super().delete_adapter(name)
