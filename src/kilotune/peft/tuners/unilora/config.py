"""PEFT's UniLoraConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from ....config import AdapterConfig
from ....methods import UniLoraConfig as OurConfig
from ...config import CONFIGS, OURS, PeftConfig

__all__ = ["UniLoraConfig"]


@final
@dataclass
class UniLoraConfig(PeftConfig):
    """Uni-LoRA's options as PEFT has them, in its order: the indices are those that PEFT draws.

    Our own, at the end: generator and strict_targets, as in :class:`kilotune.UniLoraConfig`.
    """

    ours: ClassVar[type[AdapterConfig] | None] = OurConfig

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    target_modules: list[str] | set[str] | str | None = None
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    generator: str = field(default="peft", metadata=OURS)
    strict_targets: bool = field(default=False, metadata=OURS)

    @classmethod
    def of_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
        """Where the indices of a file come from, as far as a configuration alone can say."""
        meant = OurConfig.from_file({"save_indices": values.get("save_indices", False)}, section)
        return {"generator": meant.generator}


CONFIGS["UNILORA"] = UniLoraConfig
