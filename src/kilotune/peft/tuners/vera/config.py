"""PEFT's VeraConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from ....config import AdapterConfig
from ....methods import VeraConfig as OurConfig
from ...config import CONFIGS, OURS, PeftConfig

__all__ = ["VeraConfig"]


@final
@dataclass
class VeraConfig(PeftConfig):
    """VeRA's options as PEFT has them, in its order and with its defaults: the matrices are those that PEFT draws.

    Our own, at the end, are those of :class:`kilotune.VeraConfig`. For a file of kilobytes that loads bit-identically
    anywhere: ``save_projection=False, generator="portable"``.
    """

    ours: ClassVar[type[AdapterConfig] | None] = OurConfig

    r: int = 256
    target_modules: list[str] | set[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    generator: str = field(default="peft", metadata={**OURS, "read": "stored"})
    sharing: str = field(default="nested", metadata=OURS)
    use_dora: bool = field(default=False, metadata=OURS)
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata=OURS)
    strict_targets: bool = field(default=False, metadata=OURS)

    @classmethod
    def of_file(cls, values: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
        """Where the matrices of a file come from, as far as a configuration alone can say."""
        meant = OurConfig.from_file({"save_projection": values.get("save_projection", True)}, section)
        return {"generator": meant.generator}


CONFIGS["VERA"] = VeraConfig
