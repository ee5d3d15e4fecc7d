"""PEFT's names, paths and shapes over kilotune: ``import kilotune.peft as peft`` runs a script written for PEFT.

A name that is not here raises an ImportError that says what to use. Nothing in kilotune imports this; it translates at
the edge: configurations become ours (config.py), our layers show themselves as PEFT's (layer_shape.py).
"""

from __future__ import annotations

import sys
from opcode import opmap
from types import FrameType
from typing import TYPE_CHECKING, Any

from .._lazy import lazy
from .vocabulary import PEFT, advice

if TYPE_CHECKING:
    from .auto import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .config import (
        PeftConfig,
        PrefixTuningConfig,
        PromptLearningConfig,
    )
    from .in_place import install
    from .mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        get_peft_config,
        inject_adapter_in_model,
    )
    from .mapping_func import (
        get_peft_model,
    )
    from .mixed_model import (
        PeftMixedModel,
    )
    from .peft_model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_layer_status,
        get_model_status,
    )
    from .tuners import (
        EvaConfig,
        IA3Config,
        IA3Model,
        LoftQConfig,
        LoraConfig,
        LoraModel,
        LoraRuntimeConfig,
        UniLoraConfig,
        UniLoraModel,
        VBLoRAConfig,
        VBLoRAModel,
        VeraConfig,
        VeraModel,
        convert_to_lora,
        get_eva_state_dict,
        initialize_lora_eva_weights,
        save_as_lora,
    )
    from .utils import (
        NoMatchingPeftModuleError,
        PeftError,
        PeftType,
        PeftWarning,
        TaskType,
        cast_mixed_precision_params,
        get_base_model_state_dict,
        get_peft_model_state_dict,
        infer_device,
        load_peft_weights,
        prepare_model_for_kbit_training,
        replace_lora_weights_loftq,
        set_base_model_state_dict,
        set_peft_model_state_dict,
        shift_tokens_right,
    )

__version__ = PEFT

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "EvaConfig",
    "IA3Config",
    "IA3Model",
    "LoftQConfig",
    "LoraConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixTuningConfig",
    "PromptLearningConfig",
    "TaskType",
    "UniLoraConfig",
    "UniLoraModel",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeraConfig",
    "VeraModel",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "infer_device",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "install",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]

_find, __dir__ = lazy(
    __name__,
    {
        "auto": (
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        ),
        "config": (
            "PeftConfig",
            "PrefixTuningConfig",
            "PromptLearningConfig",
        ),
        "in_place": ("install",),
        "mapping": (
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
            "get_peft_config",
            "inject_adapter_in_model",
        ),
        "mapping_func": ("get_peft_model",),
        "mixed_model": ("PeftMixedModel",),
        "peft_model": (
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
            "get_layer_status",
            "get_model_status",
        ),
        "tuners": (
            "EvaConfig",
            "get_eva_state_dict",
            "initialize_lora_eva_weights",
            "IA3Config",
            "IA3Model",
            "LoftQConfig",
            "LoraConfig",
            "LoraModel",
            "LoraRuntimeConfig",
            "UniLoraConfig",
            "UniLoraModel",
            "VBLoRAConfig",
            "VBLoRAModel",
            "VeraConfig",
            "VeraModel",
            "convert_to_lora",
            "save_as_lora",
        ),
        "utils": (
            "NoMatchingPeftModuleError",
            "PeftError",
            "PeftType",
            "PeftWarning",
            "TaskType",
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
        ),
    },
)

if not TYPE_CHECKING:  # type checkers have the imports above, and no name beside them

    def __getattr__(name: str) -> Any:
        try:
            return _find(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            error = ImportError if _imports(sys._getframe(1)) else AttributeError
            raise error(advice(name), name=name) from None


def _imports(frame: FrameType) -> bool:
    """Whether the code there is at ``from kilotune.peft import ...``, whose own error would not say what to use."""
    return frame.f_code.co_code[frame.f_lasti] == opmap["IMPORT_FROM"]
