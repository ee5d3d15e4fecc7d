"""PEFT's UniLoraModel."""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn

from ..tuners_utils import BaseTuner

__all__ = ["UniLoraModel"]


@final
class UniLoraModel(BaseTuner):
    """A base model with adapters, the first of them UniLora's; others may be of any method."""

    prefix: ClassVar[str] = "unilora_"

    @property
    def unilora_theta_d(self) -> nn.ParameterDict:
        """The trained vector (theta_d_length,) of each adapter."""
        return self.model_wide("unilora_theta_d")
