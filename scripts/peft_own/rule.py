"""Which of PEFT's tests concern what kilotune has: the rule, and what it looks at.

It is asked of a test that ran, and passed, on PEFT itself:

1. Every class of configs among its parameters is one that kilotune has.
2. Every config that it made, or found ready-made there, is of such a class, and sets only options that kilotune has,
   to values that it has.
3. Where there was no config at all, its own code, or that of its fixtures, uses a name of PEFT.
4. No such name is of a module of another method, unless its parameters say its configs: a test of many methods names
   those that it passes over.

A test that fails on PEFT without a network is no test for us, unless a tiny model can take the place of the hub's;
what is left of these is counted apart.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# What every config of PEFT has.
_FILE = {"peft_type", "peft_version", "auto_mapping"}  # in every file
COMMON = frozenset({"task_type", "base_model_name_or_path", "revision", "inference_mode", *_FILE})
TARGETS = frozenset({"target_modules", "fan_in_fan_out", "bias", "modules_to_save"})
LAYERS = frozenset({"layers_to_transform", "layers_pattern"})
OPTIONS: Mapping[str, frozenset[str]] = {
    "PeftConfig": COMMON,
    "PromptLearningConfig": frozenset(),
    "LoraConfig": COMMON
    | TARGETS
    | LAYERS
    | {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern"}
    | {"alpha_pattern", "exclude_modules", "target_parameters", "loftq_config", "eva_config"},
    "VeraConfig": COMMON
    | TARGETS
    | LAYERS
    | {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"},
    "IA3Config": COMMON | TARGETS | {"exclude_modules", "feedforward_modules", "init_ia3_weights"},
    "UniLoraConfig": COMMON
    | TARGETS
    | LAYERS
    | {"r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights", "save_indices"},
    "VBLoRAConfig": COMMON
    | TARGETS
    | LAYERS
    | {"r", "num_vectors", "vector_length", "topk", "exclude_modules", "save_only_topk_weights", "vblora_dropout"}
    | {"init_vector_bank_bound", "init_logits_std"},
}
HAD_CONFIGS = frozenset(OPTIONS) - {"PromptLearningConfig"}
# Starts of LoRA's factors that kilotune lacks: CorDA, LoRA-GA, MiCA, and those of variants with options of their own.
LEFT_OUT_VALUES: Mapping[str, tuple[str, ...]] = {"init_lora_weights": ("corda", "lora_ga", "mica", "monteclora")}

# How the names of PEFT begin that concern something kilotune lacks; the others are common, or of a method that it has.
LEFT_OUT_MODULES: Mapping[str, str] = {
    "peft.optimizers.riemannian": "another optimizer",
    "peft.tuners.lora.arrow": "Arrow",
    "peft.tuners.lora.corda": "CorDA",
    "peft.tuners.lora.intruders": "the reduction of intruder dimensions",
    "peft.tuners.lora.loraga": "LoRA-GA",
    "peft.tuners.lora.monteclora": "MonteCLoRA",
    "peft.tuners.lora.velora": "VeLoRA",
    "peft.tuners.lora.tp_layer": "Megatron",
    "peft.tuners.lora.variants.ALora": "activated LoRA",
    "peft.tuners.lora.variants.calculate_alora": "activated LoRA",
    "peft.tuners.lora.variants.get_alora": "activated LoRA",
    "peft.tuners.lora.variants.BlockDiagonal": "BD-LoRA",
    "peft.tuners.lora.variants.Kasa": "KaSA",
    "peft.tuners.lycoris_utils": "LoHa and LoKr",
}
HAD_TUNERS = frozenset({"lora", "vera", "ia3", "unilora", "vblora", "tuners_utils", "_buffer_dict", "mixed"})


# Tests that a stand-in does not serve.
WANTS_THE_HUBS: Mapping[str, str] = {
    "test_tuners_utils.py::TestModelAndLayerStatus::test_transformers_model": "counts the numbers of GPT-2",
}


class Made(NamedTuple):
    """A config that a test made: its class, and the options that it set to something else than the default."""

    name: str
    options: Mapping[str, str]


class Seen(NamedTuple):
    """What is known of a test after it ran on PEFT."""

    parameters: frozenset[str]  # classes of configs among its parameters
    made: tuple[Made, ...]
    names: frozenset[str]  # dotted names of PEFT in its own code


def left_out_module(name: str) -> bool:
    """Whether a dotted name of PEFT belongs to what kilotune lacks."""
    words = name.split(".")
    if name.startswith(tuple(LEFT_OUT_MODULES)):
        return True
    return words[:2] == ["peft", "tuners"] and len(words) > 3 and words[2] not in HAD_TUNERS


def fault_of(made: Made) -> str | None:
    """Why a config is not one of ours, or None where it is."""
    if made.name not in HAD_CONFIGS:
        return f"config: {made.name}"
    for option, value in made.options.items():
        if option not in OPTIONS[made.name]:
            return f"option: {made.name}.{option}"
        if value.strip("'").startswith(LEFT_OUT_VALUES.get(option, "\0")):
            return f"option: {made.name}.{option}={value}"
    return None


def why_not(seen: Seen) -> str | None:
    """Why a test is none of ours, or None where it is one."""
    foreign = sorted(seen.parameters - HAD_CONFIGS)
    if foreign:
        return f"config: {foreign[0]}"
    fault = next(filter(None, map(fault_of, seen.made)), None)
    if fault:
        return fault
    others = [name for name in sorted(seen.names) if left_out_module(name)]
    if others and not seen.parameters:
        return f"name: {others[0]}"
    if not seen.made and not seen.parameters and not seen.names:
        return "nothing of PEFT in it"
    return None


# -- what a test has among its parameters and in its code -----------------------------------------------


def is_config(value: object) -> bool:
    """Whether it is a class of configs; also a stub of one."""
    return isinstance(value, type) and value.__module__.startswith("peft.") and value.__name__.endswith("Config")


def inner(value: Any, depth: int = 4) -> Iterator[Any]:
    """A value and what is in it."""
    yield value
    if depth and isinstance(value, Mapping):
        yield from (deep for one in value.values() for deep in inner(one, depth - 1))
    elif depth and isinstance(value, list | tuple | set | frozenset):
        yield from (deep for one in value for deep in inner(one, depth - 1))


def config_classes(values: Iterable[Any]) -> frozenset[str]:
    """The classes of configs in parameters, those of configs that are there ready-made too."""
    found = [deep for value in values for deep in inner(value)]
    classes = [value if isinstance(value, type) else type(value) for value in found]
    return frozenset(cls.__name__ for cls in classes if is_config(cls))


def ready_made(values: Iterable[Any]) -> list[Made]:
    """The configs that are there ready-made in parameters."""
    found = [deep for value in values for deep in inner(value) if is_config(type(deep))]
    return [Made(type(one).__name__, options_set(type(one), vars(one))) for one in found]


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def peft_names(function: Any) -> frozenset[str]:
    """The dotted names of PEFT that a function's own code uses, by its globals and its own imports."""
    found = set()
    for code in codes(function.__code__) if hasattr(function, "__code__") else ():
        found |= {name for name in code.co_names if name.startswith("peft.")}
        for name in code.co_names:
            value = function.__globals__.get(name)
            home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(home, str) and home.split(".")[0] == "peft":
                found.add(home if isinstance(value, types.ModuleType) else f"{home}.{name}")
    return frozenset(found)


def options_set(cls: type, arguments: Mapping[str, Any]) -> dict[str, str]:
    """The arguments that say something else than the default, as text."""
    if not dataclasses.is_dataclass(cls):
        return {}
    given = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name in arguments and arguments[field.name] is not default and arguments[field.name] != default:
            given[field.name] = repr(arguments[field.name])[:200]
    return given
