"""PEFT's VBLoRAConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from ....config import AdapterConfig
from ....methods import VbLoraConfig as OurConfig
from ...config import CONFIGS, OURS, PeftConfig

__all__ = ["VBLoRAConfig"]


@final
@dataclass
class VBLoRAConfig(PeftConfig):
    """VB-LoRA's options as PEFT has them, in its order; our own, at the end: strict_targets."""

    ours: ClassVar[type[AdapterConfig] | None] = OurConfig

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    strict_targets: bool = field(default=False, metadata=OURS)


CONFIGS["VBLORA"] = VBLoRAConfig
