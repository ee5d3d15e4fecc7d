"""PEFT's IA3Config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from ....config import AdapterConfig
from ....methods import Ia3Config
from ...config import CONFIGS, OURS, PeftConfig

__all__ = ["IA3Config"]


@final
@dataclass
class IA3Config(PeftConfig):
    """IA3's options as PEFT has them, in its order."""

    ours: ClassVar[type[AdapterConfig] | None] = Ia3Config

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True
    strict_targets: bool = field(default=False, metadata=OURS)

    def __post_init__(self) -> None:
        if isinstance(self.feedforward_modules, list):
            self.feedforward_modules = set(self.feedforward_modules)
        super().__post_init__()


CONFIGS["IA3"] = IA3Config
