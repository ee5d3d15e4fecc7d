"""PEFT's IA3Model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from ....errors import ConfigError
from ...weighted import add_scales
from ..tuners_utils import BaseTuner

__all__ = ["IA3Model"]


@final
class IA3Model(BaseTuner):
    """A base model with adapters, the first of them IA3's; others may be of any method."""

    prefix: ClassVar[str] = "ia3_"

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose vectors are the weighted sums of those of others; not active until set, and frozen.

        Args:
            adapters: names of IA3 adapters.
            weights: one for each; may be negative. A layer that an adapter lacks gets nothing from it, as in PEFT.
            adapter_name: of the new one; where it is taken, nothing is done, as in PEFT.

        Raises:
            AdapterError: an unknown adapter. ConfigError: adapters that cannot be added so.

        """
        if adapter_name in self.peft_config:
            return
        if len(adapters) != len(weights):
            raise ConfigError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
        add_scales(self, adapters, weights, adapter_name)
