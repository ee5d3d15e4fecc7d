"""PEFT's VeraModel."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from ..tuners_utils import BaseTuner

__all__ = ["VeraModel"]


@final
class VeraModel(BaseTuner):
    """A base model with adapters, the first of them Vera's; others may be of any method."""

    prefix: ClassVar[str] = "vera_lambda_"

    @property
    def vera_A(self) -> dict[str, Tensor]:
        """The first matrix (r, in) of each adapter, as large as its largest layer needs it."""
        return self._matrices("vera_A")

    @property
    def vera_B(self) -> dict[str, Tensor]:
        """The second matrix (out, r) of each adapter, as large as its largest layer needs it."""
        return self._matrices("vera_B")

    def _matrices(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in self.adapted_layers().values():
            for adapter, matrix in getattr(layer, name, {}).items():
                if adapter not in found or matrix.numel() > found[adapter].numel():
                    found[adapter] = matrix
        return found
