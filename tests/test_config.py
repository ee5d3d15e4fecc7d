"""Every rule of a configuration, with its message; and adapter_config.json's keys in and out."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import pytest

from kilotune import METHODS, AdapterConfig, ConfigError, KilotuneError, LoraConfig, TaskType, VeraConfig, get_config
from kilotune.config import FORMAT_VERSION, HARMLESS_KEYS
from kilotune.methods.lora import NAMED

BOTH: list[type[AdapterConfig]] = [VeraConfig, LoraConfig]
both = pytest.mark.parametrize("cls", BOTH)


def message(cls: type[AdapterConfig], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        cls(**options)
    assert isinstance(caught.value, ValueError)
    text = str(caught.value)
    assert text.startswith(f"{cls.__name__}:\n  - ")
    return text


# (class, options, what the message says)
WRONG: list[tuple[type[AdapterConfig], dict[str, Any], str]] = [
    *((cls, {"r": value}, f"r: expected a whole number >= 1, got {value!r}") for cls in BOTH for value in (0, -3)),
    *(
        (cls, {"r": value}, f"r: expected a whole number >= 1, got {value!r}")
        for cls in BOTH
        for value in (2.0, "8", None, True, float("nan"), float("inf"), [4])
    ),
    *((cls, {"r": 10**30}, f"r: expected a whole number below 2**31, got {10**30}") for cls in BOTH),
    (LoraConfig, {"lora_alpha": -1}, "lora_alpha: expected a number >= 0, got -1"),
    (LoraConfig, {"lora_alpha": float("inf")}, "lora_alpha: expected a number >= 0, got inf"),
    (LoraConfig, {"lora_alpha": "16"}, "lora_alpha: expected a number >= 0, got '16'"),
    (LoraConfig, {"lora_dropout": 1.0}, "lora_dropout: expected a number in [0, 1), got 1.0"),
    (LoraConfig, {"lora_dropout": -0.1}, "lora_dropout: expected a number in [0, 1], got -0.1"),
    (VeraConfig, {"vera_dropout": 1.5}, "vera_dropout: expected a number in [0, 1], got 1.5"),
    (VeraConfig, {"vera_dropout": None}, "vera_dropout: expected a number in [0, 1], got None"),
    (VeraConfig, {"d_initial": float("nan")}, "d_initial: expected a number that is finite, got nan"),
    (VeraConfig, {"d_initial": 10**400}, "d_initial: expected a number that is finite, got 1000"),
    (LoraConfig, {"use_rslora": 1}, "use_rslora: expected bool, got 1"),
    (VeraConfig, {"save_projection": "no"}, "save_projection: expected bool, got 'no'"),
    (VeraConfig, {"init_weights": None}, "init_weights: expected bool, got None"),
    *((cls, {"fan_in_fan_out": "yes"}, "fan_in_fan_out: expected bool, got 'yes'") for cls in BOTH),
    *((cls, {"inference_mode": 0}, "inference_mode: expected bool, got 0") for cls in BOTH),
    *(
        (
            VeraConfig,
            {"projection_prng_key": key},
            f"projection_prng_key: expected a whole number in 0 ... 2**64 - 1, got {key!r}",
        )
        for key in (-1, 2**64, 1.0, "0", True, None)
    ),
    (VeraConfig, {"generator": "numpy"}, "generator: expected one of ['portable', 'peft', 'stored'], got 'numpy'"),
    (VeraConfig, {"sharing": "all"}, "sharing: expected one of ['nested', 'shape'], got 'all'"),
    (VeraConfig, {"sharing": "shape", "generator": "peft"}, "sharing='shape' needs generator='portable', got 'peft'"),
    (
        LoraConfig,
        {"init_lora_weights": "corda"},
        "init_lora_weights: expected True, False, " + NAMED + ", got 'corda'",
    ),
    (
        LoraConfig,
        {"init_lora_weights": 0},
        "init_lora_weights: expected True, False, " + NAMED + ", got 0",
    ),
    (
        LoraConfig,
        {"init_lora_weights": None},
        "init_lora_weights: expected True, False, " + NAMED + ", got None",
    ),
    (
        LoraConfig,
        {"target_parameters": "w1"},
        "target_parameters: expected a list of parameter names, got 'w1'",
    ),
    (LoraConfig, {"rank_pattern": [1]}, "rank_pattern: expected a dictionary, got [1]"),
    (LoraConfig, {"rank_pattern": {"q": 0}}, "rank_pattern['q']: expected a whole number >= 1, got 0"),
    (LoraConfig, {"alpha_pattern": {"q": "x"}}, "alpha_pattern['q']: expected a number >= 0, got 'x'"),
    (LoraConfig, {"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no regular expression"),
    (
        VeraConfig,
        {"bias": "lora_only"},
        "bias: expected one of ['none', 'all', 'vera_only'], got 'lora_only'. Did you mean 'vera_only'?",
    ),
    (LoraConfig, {"bias": "al"}, "bias: expected one of ['none', 'all', 'lora_only'], got 'al'. Did you mean 'all'?"),
    *((cls, {"bias": None}, "got None") for cls in BOTH),
    *((cls, {"task_type": "CAUSAL"}, "task_type: expected one of ['SEQ_CLS',") for cls in BOTH),
    *((cls, {"task_type": "CAUSAL_LN"}, "got 'CAUSAL_LN'. Did you mean 'CAUSAL_LM'?") for cls in BOTH),
    *((cls, {"target_modules": ""}, "target_modules: is an empty string") for cls in BOTH),
    *((cls, {"target_modules": []}, "target_modules: is an empty list") for cls in BOTH),
    *((cls, {"target_modules": 5}, "target_modules: expected a list of module names, got (5,)") for cls in BOTH),
    *(
        (cls, {"target_modules": ["q", 5]}, "target_modules: expected a list of module names, got ('q', 5)")
        for cls in BOTH
    ),
    *((cls, {"target_modules": ["q", ""]}, "target_modules: expected a list of module names") for cls in BOTH),
    *((cls, {"target_modules": {"q": 1}}, "target_modules: expected a list of module names") for cls in BOTH),
    *((cls, {"target_modules": "q_(proj"}, "target_modules: 'q_(proj' is no regular expression") for cls in BOTH),
    *((cls, {"exclude_modules": "*"}, "exclude_modules: '*' is no regular expression") for cls in BOTH),
    *((cls, {"modules_to_save": [1]}, "modules_to_save: expected a list of module names, got (1,)") for cls in BOTH),
    *((cls, {"layers_pattern": "h"}, "layers_pattern: has no effect without layers_to_transform") for cls in BOTH),
    *(
        (
            cls,
            {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "("},
            "layers_pattern: '(' is no regular expression",
        )
        for cls in BOTH
    ),
    *(
        (
            cls,
            {"target_modules": ["q"], "layers_to_transform": value},
            "layers_to_transform: expected block indices >= 0",
        )
        for cls in BOTH
        for value in (-1, [0, -2], [1.5], ["0"], True)
    ),
    *(
        (
            cls,
            {"target_modules": target, "layers_to_transform": 1},
            "layers_to_transform: needs target_modules to be a list",
        )
        for cls in BOTH
        for target in ("all-linear", ".*q")
    ),
]


@pytest.mark.parametrize(("cls", "options", "text"), WRONG, ids=lambda v: v if isinstance(v, str) else None)
def test_a_wrong_value_is_named_with_what_was_expected(cls: type[AdapterConfig], options: Any, text: str) -> None:
    assert text in message(cls, **options)


@both
@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("target_module", "target_modules"),
        ("targets", "target_modules"),
        ("rank", "r"),
        ("dropout", "_dropout"),
        ("layer_to_transform", "layers_to_transform"),
        ("Bias", "bias"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(cls: type[AdapterConfig], key: str, near: str) -> None:
    text = message(cls, **{key: 1})
    assert f"unknown option {key!r}. Did you mean '" in text
    assert near in text.partition("Did you mean ")[2].partition("?")[0]
    assert all(name in text.partition("All: ")[2] for name in cls.option_names())


def test_a_key_like_no_other_gets_the_list_only() -> None:
    text = message(VeraConfig, zzzzzz=1)
    assert "unknown option 'zzzzzz'. All: target_modules" in text
    assert "Did you mean" not in text


@both
def test_all_faults_come_at_once(cls: type[AdapterConfig]) -> None:
    text = message(cls, r=0, bias="some", task_type="X", target_modules=[], inference_mode=1)
    for part in ("r: ", "bias: ", "task_type: ", "target_modules: ", "inference_mode: "):
        assert f"\n  - {part}" in text
    assert text.count("\n  - ") == 5
    text = message(cls, rr=1, zz=2)
    assert text.count("unknown option") == 2


@both
def test_options_are_given_by_name(cls: type[AdapterConfig]) -> None:
    with pytest.raises(ConfigError, match="options are given by name, not by position"):
        cls(8)  # type: ignore[misc]


@both
def test_a_config_is_frozen_and_equal_to_its_like(cls: type[AdapterConfig]) -> None:
    config = cls(r=4, target_modules=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 5
    assert config == cls(r=4, target_modules=("a",))
    assert config != cls(r=5, target_modules=["a"])
    assert config.replace(r=6).r == 6
    assert config.r == 4
    with pytest.raises(ConfigError, match="r: expected"):
        config.replace(r=0)
    with pytest.raises(ConfigError, match="unknown option 'rank'"):
        config.replace(rank=0)


@both
def test_values_are_brought_to_one_form(cls: type[AdapterConfig]) -> None:
    config = cls(
        target_modules={"b", "a"},
        modules_to_save="head",
        layers_to_transform=3,
        layers_pattern="h",
        task_type=TaskType.SEQ_CLS,
    )
    assert config.target_modules == ("a", "b")
    assert config.modules_to_save == ("head",)
    assert config.layers_to_transform == (3,)
    assert config.layers_pattern == ("h",)
    assert config.task_type == "SEQ_CLS"
    assert type(config.task_type) is str
    assert cls(target_modules="a.*b").target_modules == "a.*b"
    assert cls(modules_to_save=[]).modules_to_save is None  # an empty list saves nothing


def test_the_defaults() -> None:
    vera, lora = VeraConfig(), LoraConfig()
    assert (vera.r, vera.d_initial, vera.projection_prng_key, vera.save_projection) == (256, 0.1, 0, False)
    assert (vera.vera_dropout, vera.init_weights, vera.generator, vera.sharing) == (0.0, True, "portable", "nested")
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora, lora.init_lora_weights) == (
        8,
        8,
        0,
        False,
        True,
    )
    for config in (vera, lora):
        assert (config.bias, config.target_modules, config.modules_to_save) == ("none", None, None)
        assert (config.fan_in_fan_out, config.inference_mode, config.task_type) == (False, False, None)
    assert VeraConfig(vera_dropout=0.3).dropout == 0.3
    assert LoraConfig(lora_dropout=0.4).dropout == 0.4
    assert VeraConfig(projection_prng_key=2**64 - 1).projection_prng_key == 2**64 - 1


def test_one_configs_dictionaries_are_not_anothers() -> None:
    with pytest.raises(TypeError, match="a configuration is frozen"):
        LoraConfig().rank_pattern["x"] = 3
    assert LoraConfig().rank_pattern == {}


@pytest.mark.parametrize("name", [*METHODS, "VERA", "Lora"])
def test_get_config_picks_the_class_by_the_methods_name(name: str) -> None:
    config = get_config(name, target_modules=["one"])
    assert type(config) is METHODS[name.lower()].config_cls
    assert config.target_modules == ("one",)


def test_an_unknown_method_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'vra'\. Did you mean 'vera'\? Methods: "):
        get_config("vra")
    with pytest.raises(KilotuneError, match="unknown method 'ia4'.* Did you mean 'ia3'"):
        get_config("ia4")
    with pytest.raises(ConfigError, match="'dora' stands for use_dora=True, got use_dora=False; take 'lora'"):
        get_config("dora", use_dora=False)
    with pytest.raises(ConfigError, match="unknown option 'rank'"):
        get_config("vera", rank=3)


@both
def test_every_option_has_a_help_text(cls: type[AdapterConfig]) -> None:
    for name in cls.option_names():
        assert len(cls.help_of(name)) > 8


# -- adapter_config.json ---------------------------------------------------------------------------

FULL: list[AdapterConfig] = [
    VeraConfig(r=4, target_modules=["a", "b"], bias="vera_only", modules_to_save=["h"], layers_to_transform=[1, 2]),
    VeraConfig(target_modules=".*q", sharing="shape", exclude_modules=["x"], projection_prng_key=2**64 - 1),
    LoraConfig(r=2, lora_alpha=0.5, target_modules=["a"], rank_pattern={"a": 3}, alpha_pattern={"b": 2.5}),
    LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", revision="v1", inference_mode=True),
]


@pytest.mark.parametrize("config", FULL, ids=range(len(FULL)))
def test_json_in_and_out_keeps_every_value(config: AdapterConfig) -> None:
    text = json.dumps(config.to_dict())
    values, section = json.loads(text), json.loads(json.dumps(config.ours()))
    assert values["peft_type"] == config.peft_type
    assert list(values) == sorted(values)
    assert not set(section) & set(values)
    back = type(config).from_dict({**values, **section})
    assert back == config


def test_what_peft_knows_and_is_off_is_accepted_and_what_is_on_is_refused_by_name() -> None:
    values = {**LoraConfig(r=2).to_dict(), "peft_version": "0.21.0", "use_dora": False, "loftq_config": {}, "eva": None}
    assert LoraConfig.from_dict(values) == LoraConfig(r=2)
    with pytest.raises(ConfigError) as caught:
        LoraConfig.from_dict({**values, "lora_bias": True, "layer_replication": [[0, 4]]})
    assert "lora_bias=True: unknown option 'lora_bias'" in str(caught.value)
    assert "layer_replication=[[0, 4]]: unknown option" in str(caught.value)
    assert "If it is an option of PEFT, kilotune lacks it." in str(caught.value)


def test_harmless_keys_are_no_options() -> None:
    for cls in BOTH:
        assert not set(cls.option_names()) & HARMLESS_KEYS


def test_the_format_has_a_version() -> None:
    assert isinstance(FORMAT_VERSION, int)
    assert sys.maxsize > FORMAT_VERSION >= 1
