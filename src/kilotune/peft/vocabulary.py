"""PEFT's public names, and what becomes of each here. docs/peft.md is made from this; a test holds it to PEFT's own.

A name is here (its home in this package), or another name does it (what), or it is not here (why).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final

__all__ = ["HOMES", "PEFT", "Absent", "absent", "advice"]

PEFT = "0.21.2"  # whose names these are

HOMES: Mapping[str, tuple[str, ...]] = {
    "auto": (
        *("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "AutoPeftModel", "AutoPeftModelForCausalLM"),
        *("AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM"),
        *("AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification"),
    ),
    "config": ("PeftConfig", "PromptLearningConfig"),
    "mapping": (
        *("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"),
        *("get_peft_config", "inject_adapter_in_model"),
    ),
    "mapping_func": ("get_peft_model",),
    "mixed_model": ("PeftMixedModel",),
    "peft_model": (
        *("PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering"),
        *("PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification"),
        *("get_layer_status", "get_model_status"),
    ),
    "tuners": (
        *("EvaConfig", "get_eva_state_dict", "initialize_lora_eva_weights"),
        *("IA3Config", "IA3Model", "LoraConfig", "LoraModel", "LoraRuntimeConfig"),
        *("UniLoraConfig", "UniLoraModel", "VeraConfig", "VeraModel"),
    ),
    "utils": (
        *("NoMatchingPeftModuleError", "PeftError", "PeftType", "PeftWarning", "TaskType"),
        *("cast_mixed_precision_params", "get_base_model_state_dict", "get_peft_model_state_dict"),
        *("load_peft_weights", "prepare_model_for_kbit_training", "set_base_model_state_dict"),
        *("set_peft_model_state_dict", "shift_tokens_right", "infer_device"),
    ),
}


@final
class Absent(NamedTuple):
    """A name that is not here.

    why: in a few words. instead: what to use; "" where there is nothing.
    """

    why: str
    instead: str = ""


_METHOD = "a method that kilotune lacks"
_PROMPT = "trains a prompt, which is part of the input and no change of the base"
_LARGE = Absent(_METHOD, "LoraConfig, or VeraConfig and UniLoraConfig for kilobytes")
_TOKENS = Absent(_PROMPT, "LoraConfig or VeraConfig")

# What a name begins with -> what to say of it; the longest that fits counts.
_ABSENT: Mapping[str, Absent] = {
    **dict.fromkeys(
        (
            *("AdaLora", "Adamss", "Arrow", "BdLora", "Beft", "BOFT", "C3A", "Deft", "Delora", "FourierFT", "Frod"),
            *("Glora", "Gralora", "HRA", "Hira", "Kasa", "LNTuning", "Lily", "LoHa", "LoKr", "Miss", "Montecl", "OFT"),
            *("OSF", "Peanut", "Poly", "Psoft", "Pvera", "RandLora", "Road", "Shadow", "Shira", "Supertuning"),
            *("TinyLora", "TrainableTokens", "VBLoRA", "Velora", "WaveFT", "XLora", "create_arrow_model"),
        ),
        _LARGE,
    ),
    **dict.fromkeys(
        (
            *("AdaptionPrompt", "CPT", "Cartridge", "MultitaskPrompt", "Prefix", "Prompt", "compose_cartridge"),
            *("initialize_kv_prefix", "prompt_embeddings_from", "TRANSFORMERS_MODELS_TO_PREFIX", "bloom_model_post"),
        ),
        _TOKENS,
    ),
    **dict.fromkeys(
        (
            "LoftQConfig",
            "LoraGAConfig",
            "preprocess_loraga",
            "replace_lora_weights",
        ),
        Absent("a start of LoRA that kilotune lacks", 'LoraConfig with init_lora_weights="pissa" or "eva"'),
    ),
    "convert_to_lora": Absent("not there yet", "kilotune convert --to lora, for a VeRA file"),
    "save_as_lora": Absent("not there yet", "kilotune convert --to lora, for a VeRA file"),
    "find_kappa": Absent("a choice of targets by condition numbers", 'target_modules="all-linear"'),
}


def absent(name: str) -> Absent | None:
    """What there is to say of a name that is not here; None where PEFT has no such name that we know."""
    fits = [start for start in _ABSENT if name.startswith(start)]
    return _ABSENT[max(fits, key=len)] if fits else None


def advice(name: str) -> str:
    """The message of the error for a name that is not here."""
    found = absent(name)
    if found is None:
        return f"kilotune.peft has no {name!r}; docs/peft.md lists PEFT's names and what is here"
    instead = f"; use {found.instead}" if found.instead else ""
    return f"kilotune.peft has no {name!r}: {found.why}{instead}"
