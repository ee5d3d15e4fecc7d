"""As ``peft.utils``.

Begin in ``save_and_load.py``: an adapter's numbers out of a model and into it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy

if TYPE_CHECKING:
    from .constants import CONFIG_NAME, INCLUDE_LINEAR_LAYERS_SHORTHAND, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    from .error import NoMatchingPeftModuleError, PeftError
    from .loftq_utils import replace_lora_weights_loftq
    from .other import (
        AuxiliaryTrainingWrapper,
        ModulesToSaveWrapper,
        _get_submodules,
        cast_mixed_precision_params,
        infer_device,
        prepare_model_for_kbit_training,
        shift_tokens_right,
        transpose,
    )
    from .peft_types import PeftType, TaskType
    from .save_and_load import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        load_peft_weights,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from .warning import PeftWarning

__all__ = [
    "CONFIG_NAME",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "_get_submodules",
    "cast_mixed_precision_params",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "transpose",
]

if not TYPE_CHECKING:  # configurations stand on one of these files, and others on the configurations
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "constants": ("CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME"),
            "error": ("NoMatchingPeftModuleError", "PeftError"),
            "other": (
                "AuxiliaryTrainingWrapper",
                "ModulesToSaveWrapper",
                "_get_submodules",
                "cast_mixed_precision_params",
                "infer_device",
                "prepare_model_for_kbit_training",
                "shift_tokens_right",
                "transpose",
            ),
            "loftq_utils": ("replace_lora_weights_loftq",),
            "peft_types": ("PeftType", "TaskType"),
            "save_and_load": (
                "get_base_model_state_dict",
                "get_peft_model_state_dict",
                "load_peft_weights",
                "set_base_model_state_dict",
                "set_peft_model_state_dict",
            ),
            "warning": ("PeftWarning",),
        },
    )
