"""PEFT's LoraConfig, and the options that it has for some starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from ....config import AdapterConfig
from ....methods import LoraConfig as OurConfig
from ...config import CONFIGS, OURS, PeftConfig

__all__ = ["LoraConfig", "LoraRuntimeConfig"]


@final
@dataclass
class LoraRuntimeConfig:
    """As in PEFT: what holds of one run. Only its default is here."""

    ephemeral_gpu_offload: bool = False


@final
@dataclass
class LoraConfig(PeftConfig):
    """LoRA's options as PEFT has them, in its order; what is not here is refused where it is switched on.

    Our own, at the end: lora_fa and strict_targets, as in :class:`kilotune.LoraConfig`.
    """

    ours: ClassVar[type[AdapterConfig] | None] = OurConfig

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False
    lora_fa: bool = field(default=False, metadata=OURS)
    strict_targets: bool = field(default=False, metadata=OURS)

    def __post_init__(self) -> None:
        self.runtime_config = LoraRuntimeConfig() if self.runtime_config is None else self.runtime_config
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """All options but ``runtime_config``, which holds of one run."""
        return {key: value for key, value in super().to_dict().items() if key != "runtime_config"}


CONFIGS["LORA"] = LoraConfig
