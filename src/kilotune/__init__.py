"""kilotune: fine-tunes measured in kilobytes, one per user, over one frozen base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy

if TYPE_CHECKING:
    from .adapter_files.fitting import OtherBaseWarning
    from .adapter_files.stands_on import StandsOnWarning
    from .config import AdapterConfig, TaskType
    from .diffusers_lora.loading import load_diffusers_lora
    from .diffusers_lora.saving import save_diffusers_lora
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
    from .injection.targets import UnmatchedTargetsWarning
    from .layers.adapted_parameters import TiedTableWarning, UntrainedExpertsWarning
    from .methods import (
        METHODS,
        BitfitConfig,
        BottleneckConfig,
        C3aConfig,
        FourierFtConfig,
        Ia3Config,
        IntrinsicConfig,
        LoraConfig,
        LoraXsConfig,
        MissConfig,
        RandLoraConfig,
        TinyLoraConfig,
        UniLoraConfig,
        VbLoraConfig,
        VeraConfig,
        WaveFtConfig,
        get_config,
    )
    from .model.merging import MergePrecisionWarning
    from .model.optimizer_groups import optimizer_groups
    from .model.parameter_report import ParameterReport, count_parameters
    from .model.peft_model import LoraModel, PeftModel, VeraModel, get_peft_model
    from .model.unused_layers import UnusedLayersWarning

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AdapterConfig",
    "AdapterError",
    "BitfitConfig",
    "BottleneckConfig",
    "C3aConfig",
    "CheckpointError",
    "ConfigError",
    "FourierFtConfig",
    "Ia3Config",
    "IntrinsicConfig",
    "KilotuneError",
    "LoraConfig",
    "LoraModel",
    "LoraXsConfig",
    "MergeError",
    "MergePrecisionWarning",
    "MissConfig",
    "MissingExtraError",
    "OtherBaseWarning",
    "ParameterReport",
    "PeftModel",
    "RandLoraConfig",
    "StandsOnWarning",
    "TargetError",
    "TaskType",
    "TiedTableWarning",
    "TinyLoraConfig",
    "UniLoraConfig",
    "UnmatchedTargetsWarning",
    "UnsupportedError",
    "UntrainedExpertsWarning",
    "UnusedLayersWarning",
    "VbLoraConfig",
    "VeraConfig",
    "VeraModel",
    "WaveFtConfig",
    "count_parameters",
    "get_config",
    "get_peft_model",
    "load_diffusers_lora",
    "optimizer_groups",
    "save_diffusers_lora",
]

if not TYPE_CHECKING:  # type checkers have the imports above, and no name beside them
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "config": ("AdapterConfig", "TaskType"),
            "errors": (
                "AdapterError",
                "CheckpointError",
                "ConfigError",
                "KilotuneError",
                "MergeError",
                "MissingExtraError",
                "TargetError",
                "UnsupportedError",
            ),
            "diffusers_lora.loading": ("load_diffusers_lora",),
            "diffusers_lora.saving": ("save_diffusers_lora",),
            "adapter_files.fitting": ("OtherBaseWarning",),
            "adapter_files.stands_on": ("StandsOnWarning",),
            "injection.targets": ("UnmatchedTargetsWarning",),
            "layers.adapted_parameters": ("TiedTableWarning", "UntrainedExpertsWarning"),
            "methods": (
                "METHODS",
                "BitfitConfig",
                "BottleneckConfig",
                "C3aConfig",
                "FourierFtConfig",
                "Ia3Config",
                "IntrinsicConfig",
                "LoraConfig",
                "LoraXsConfig",
                "MissConfig",
                "RandLoraConfig",
                "TinyLoraConfig",
                "UniLoraConfig",
                "VbLoraConfig",
                "VeraConfig",
                "WaveFtConfig",
                "get_config",
            ),
            "model.optimizer_groups": ("optimizer_groups",),
            "model.parameter_report": ("ParameterReport", "count_parameters"),
            "model.merging": ("MergePrecisionWarning",),
            "model.peft_model": ("LoraModel", "PeftModel", "VeraModel", "get_peft_model"),
            "model.unused_layers": ("UnusedLayersWarning",),
        },
    )
