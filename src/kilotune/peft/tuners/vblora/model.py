"""PEFT's VBLoRAModel."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import nn

from ....adapter_files.writing import DEFAULT, state_of
from ..tuners_utils import BaseTuner
from .config import VBLoRAConfig

__all__ = ["VBLoRAModel"]


@final
class VBLoRAModel(BaseTuner):
    """A base model with adapters, the first of them VB-LoRA's; others may be of any method."""

    prefix: ClassVar[str] = "vblora_"

    @property
    def vblora_vector_bank(self) -> nn.ParameterDict:
        """The trained vectors (num_vectors, vector_length) of each adapter."""
        return self.model_wide("vblora_vector_bank")

    def _init_vblora_vector_bank(self, config: VBLoRAConfig, adapter_name: str) -> None:
        """Start an adapter's bank anew, as PEFT's tests and scripts of users have it."""
        bound = config.init_vector_bank_bound
        with torch.no_grad():
            self.vblora_vector_bank[adapter_name].uniform_(-bound, bound)

    def get_nb_savable_parameters(self, adapter: str = DEFAULT) -> tuple[int, int]:
        """(the adapter's numbers in a file, other trained numbers), a number that takes n bytes there as n / 4."""
        installed = self.installed(adapter)
        numbers = state_of(installed)[1]
        names = [key for key in numbers if "vblora_" in key]
        own = {id(parameter) for _, parameter in installed.parameters()}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        return int(sum(numbers[key].nbytes for key in names) / 4), sum(p.numel() for p in others)

    def print_savable_parameters(self) -> None:
        """Print both, the second with the first in it."""
        own, others = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )
