"""PEFT's LoraConfig, and the options that it has for some starts."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, final

from ....config import AdapterConfig
from ....errors import ConfigError, UnsupportedError
from ....methods import LoraConfig as OurConfig
from ...config import CONFIGS, OURS, PeftConfig
from ...replication import fault_of

__all__ = ["EvaConfig", "LoftQConfig", "LoraConfig", "LoraRuntimeConfig", "refuse_offload"]


LOFTQ = (
    "init_lora_weights='loftq' puts quantised weights in the place of the base's, which stay as they are here: load "
    "the base in 4 bits, and call replace_lora_weights_loftq() when the adapter is in it"
)


@final
@dataclass
class LoraRuntimeConfig:
    """As in PEFT: what holds of one run. Only its default is here; anything else is an UnsupportedError."""

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        refuse_offload(self.ephemeral_gpu_offload)


def refuse_offload(asked: bool) -> None:
    """Refuse PEFT's option to compute on a GPU what is kept on the CPU."""
    if asked:
        raise UnsupportedError("ephemeral_gpu_offload=True: an adapter computes where its layers are; leave it out")


@final
@dataclass
class EvaConfig:
    """How EVA starts a LoRA (``kilotune.peft.initialize_lora_eva_weights``), as in PEFT.

    Attributes:
        rho: a layer gets at most this many times its rank; 1: ranks stay.
        tau: how alike components have to be from batch to batch before the batches end, a cosine.
        use_label_mask, label_mask_value: leave out tokens whose label is that value.
        whiten: divide the components by the roots of their singular values.
        adjust_scaling_factors: where a rank changes, lora_alpha changes with it, so that the scale stays.

    Raises:
        ConfigError: rho below 1, tau outside of [0, 1].

    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1.0:
            raise ConfigError(f"eva_config: `rho` must be >= 1.0, got {self.rho!r}")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"eva_config: `tau` must be between 0.0 and 1.0., got {self.tau!r}")


@final
@dataclass
class LoftQConfig:
    """As in PEFT, for scripts that name it: how ``init_lora_weights="loftq"``, which is refused, quantises the base.

    What does it here is :func:`kilotune.peft.replace_lora_weights_loftq`, over a base that is quantised already.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


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
        if isinstance(self.eva_config, dict):
            known = [one.name for one in fields(EvaConfig)]
            if unknown := [key for key in self.eva_config if key not in known]:
                raise ConfigError(f"eva_config: unknown options {unknown}; known: {', '.join(known)}")
            self.eva_config = EvaConfig(**self.eva_config)
        elif self.eva_config is not None and not isinstance(self.eva_config, EvaConfig):
            raise ConfigError(f"eva_config: expected an EvaConfig or a dictionary, got {self.eva_config!r:.100}")
        if self.eva_config is not None and self.init_lora_weights != "eva":
            warnings.warn("eva_config: has no effect without init_lora_weights='eva'", stacklevel=2)
            self.eva_config = None
        if isinstance(self.loftq_config, LoftQConfig):
            self.loftq_config = asdict(self.loftq_config)
        super().__post_init__()

    def translated(self) -> AdapterConfig:
        """As for every method; ``eva_config`` and ``layer_replication`` are none of the adapter's own options."""
        if (fault := fault_of(self.layer_replication)) is not None:
            raise ConfigError(fault)
        if str(self.init_lora_weights).lower() == "loftq":
            raise ConfigError(LOFTQ)
        held = self.eva_config, self.layer_replication
        self.eva_config = self.layer_replication = None
        try:
            return super().translated()
        finally:
            self.eva_config, self.layer_replication = held

    def to_dict(self) -> dict[str, Any]:
        """All options but ``runtime_config``, which holds of one run."""
        values = {key: value for key, value in super().to_dict().items() if key != "runtime_config"}
        return {**values, "eva_config": asdict(self.eva_config)} if isinstance(self.eva_config, EvaConfig) else values


CONFIGS["LORA"] = LoraConfig
