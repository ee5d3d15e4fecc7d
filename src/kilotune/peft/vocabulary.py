"""PEFT's public names, and what becomes of each here. docs/peft.md is made from this; a test holds it to PEFT's own.

A name is here (``kilotune.peft.__all__``), or it is not: why, and what does it instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, final

__all__ = ["PEFT", "Absent", "absent", "advice"]

PEFT = "0.21.2"  # whose names these are


@final
class Absent(NamedTuple):
    """A name that is not here.

    why: in a few words. instead: what to use; "" where there is nothing.
    """

    why: str
    instead: str = ""


_METHOD = "a method that kilotune lacks"
_PROMPT = "trains a prompt, which is part of the input and no change of the base"
_OURS = "a method under our own names only"
_LARGE = Absent(_METHOD, "LoraConfig, or VeraConfig and UniLoraConfig for kilobytes")
_TOKENS = Absent(_PROMPT, "LoraConfig or VeraConfig")

# What a name begins with -> what to say of it; the longest that fits counts.
_ABSENT: Mapping[str, Absent] = {
    **dict.fromkeys(
        (
            *("AdaLora", "Adamss", "Arrow", "BdLora", "Beft", "BOFT", "Deft", "Delora", "Frod"),
            *("Glora", "Gralora", "HRA", "Hira", "Kasa", "LNTuning", "Lily", "LoHa", "LoKr", "Montecl", "OFT"),
            *("OSF", "Peanut", "Poly", "Psoft", "Pvera", "Road", "Shadow", "Shira", "Supertuning"),
            *("TrainableTokens", "Velora", "XLora", "create_arrow_model"),
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
            "LoraGAConfig",
            "preprocess_loraga",
        ),
        Absent("a start of LoRA that kilotune lacks", 'LoraConfig with init_lora_weights="pissa" or "eva"'),
    ),
    "C3A": Absent(_OURS, "kilotune.C3aConfig"),
    "FourierFT": Absent(_OURS, "kilotune.FourierFtConfig"),
    "Miss": Absent(_OURS, "kilotune.MissConfig"),
    "RandLora": Absent(_OURS, "kilotune.RandLoraConfig"),
    "TinyLora": Absent(_OURS, "kilotune.TinyLoraConfig"),
    "WaveFT": Absent(_OURS, "kilotune.WaveFtConfig"),
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
