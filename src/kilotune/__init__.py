"""kilotune: fine-tunes measured in kilobytes, one per user, over one frozen base model."""

from __future__ import annotations

from .config import AdapterConfig, TaskType
from .errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    KilotuneError,
    MergeError,
    MissingExtraError,
    TargetError,
    UnsupportedError,
)
from .methods import (
    METHODS,
    BitfitConfig,
    BottleneckConfig,
    Ia3Config,
    IntrinsicConfig,
    LoraConfig,
    LoraXsConfig,
    UniLoraConfig,
    VeraConfig,
    get_config,
)
from .model import LoraModel, MergePrecisionWarning, PeftModel, VeraModel, get_peft_model
from .optimizer import optimizer_groups
from .parameters import TiedTableWarning, UntrainedExpertsWarning
from .report import ParameterReport, count_parameters

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterError",
    "BitfitConfig",
    "BottleneckConfig",
    "CheckpointError",
    "ConfigError",
    "Ia3Config",
    "IntrinsicConfig",
    "KilotuneError",
    "LoraConfig",
    "LoraModel",
    "LoraXsConfig",
    "MergeError",
    "MergePrecisionWarning",
    "MissingExtraError",
    "ParameterReport",
    "PeftModel",
    "TargetError",
    "TaskType",
    "TiedTableWarning",
    "UniLoraConfig",
    "UnsupportedError",
    "UntrainedExpertsWarning",
    "VeraConfig",
    "VeraModel",
    "count_parameters",
    "get_config",
    "get_peft_model",
    "optimizer_groups",
]
