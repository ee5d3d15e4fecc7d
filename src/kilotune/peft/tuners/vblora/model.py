"""PEFT's VBLoRAModel."""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn

from ..tuners_utils import BaseTuner

__all__ = ["VBLoRAModel"]


@final
class VBLoRAModel(BaseTuner):
    """A base model with adapters, the first of them VB-LoRA's; others may be of any method."""

    prefix: ClassVar[str] = "vblora_"

    @property
    def vblora_vector_bank(self) -> nn.ParameterDict:
        """The trained vectors (num_vectors, vector_length) of each adapter."""
        return self.model_wide("vblora_vector_bank")
