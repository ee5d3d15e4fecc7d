"""Which modules the targets take, and what is said when they take none."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import (
    AdapterConfig,
    ConfigError,
    Ia3Config,
    LoraConfig,
    TargetError,
    UnsupportedError,
    VeraConfig,
    get_peft_model,
    patterns,
)
from kilotune.candidates import candidates, matches_names
from kilotune.deltas import Need
from kilotune.injection.inject import plan, walk
from kilotune.injection.targets import DEFAULT_TARGETS, UnmatchedTargetsWarning, explain
from tests.support.models import Nested, Snapshot, mlp, tiny_llama

ALL = ["stem", "blocks.0.mix.up", "blocks.0.mix.down", "blocks.1.mix.up", "blocks.1.mix.down", "head"]
UP = ["blocks.0.mix.up", "blocks.1.mix.up"]


def taken(**options: Any) -> list[str]:
    return list(get_peft_model(Nested(), VeraConfig(r=2, **options)).adapted_layers())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": ["up"]}, UP),
        ({"target_modules": ["mix.up"]}, UP),
        ({"target_modules": ["blocks.1.mix.up"]}, UP[1:]),
        ({"target_modules": ("head", "stem")}, ["stem", "head"]),
        ({"target_modules": ".*up"}, UP),
        ({"target_modules": r"blocks\.\d+\.mix\.(up|down)"}, ALL[1:5]),
        ({"target_modules": ".*"}, None),  # also the norms, which cannot be adapted
        ({"target_modules": "all-linear", "exclude_modules": ["head", "mix.up"]}, ["stem", ALL[2], ALL[4]]),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, ["stem", *ALL[3:]]),
        ({"target_modules": ["up", "down"], "layers_to_transform": [1]}, ALL[3:5]),
        ({"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "blocks"}, UP[:1]),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, ALL[:-1]),
        ({"target_modules": ["stem"], "layers_to_transform": None}, ["stem"]),
    ],
)
def test_what_is_taken(options: dict[str, Any], expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(TargetError, match="LayerNorm is not a kind of layer that this method can adapt"):
            taken(**options)
    else:
        assert taken(**options) == expected


def test_block_indices_work_without_a_prefix_and_take_the_outer_block() -> None:
    base = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([mlp(), mlp()])}) for _ in "ab"])}
    )
    model = get_peft_model(base, VeraConfig(r=2, target_modules=["0.0", "1.0"], layers_to_transform=1))
    assert list(model.adapted_layers()) == ["layers.1.experts.0.0", "layers.1.experts.1.0"]


# -- messages --------------------------------------------------------------------------------------


def refused(base: nn.Module | None = None, config: Any = VeraConfig, **options: Any) -> str:
    base = Nested() if base is None else base
    before = Snapshot.of(base)
    with pytest.raises(TargetError) as caught:
        get_peft_model(base, config(r=2, **options))
    assert Snapshot.of(base) == before
    return str(caught.value)


def test_a_misspelt_name_is_shown_the_nearest_with_count_and_type() -> None:
    text = refused(target_modules=["upp", "steam"])
    assert text.startswith("the target modules match nothing:")
    assert "no module is called 'upp', or ends with it. Nearest: 'up' (2 x Linear)" in text
    assert "no module is called 'steam', or ends with it. Nearest: 'stem' (1 x Linear)" in text


def test_one_wrong_name_among_right_ones_is_told_of_and_the_others_are_adapted() -> None:
    config = LoraConfig(target_modules=["up", "dawn"])
    with pytest.warns(UnmatchedTargetsWarning, match="(?s)'dawn'.*'down' \\(2 x Linear\\)"):
        model = get_peft_model(Nested(), config)
    assert sorted(model.adapted_layers()) == ["blocks.0.mix.up", "blocks.1.mix.up"]
    assert "strict_targets" not in json.dumps([config.to_dict(), config.ours()])


def test_with_strict_targets_one_wrong_name_among_right_ones_is_refused() -> None:
    text = refused(target_modules=["up", "dawn"], strict_targets=True)
    assert text.startswith("some targets match nothing:")
    assert "'dawn'" in text
    assert "'down' (2 x Linear)" in text
    assert "'up'" not in text


def test_a_name_like_no_other_is_shown_the_linear_layers() -> None:
    text = refused(target_modules=["xxxxxxxx"])
    assert "Linear layers of this model: 'up' (2), 'down' (2), 'stem' (1), 'head' (1)." in text


def test_a_near_name_that_cannot_be_adapted_says_why() -> None:
    assert "'blocks.0.norm': LayerNorm is not a kind of layer that this method can adapt (kinds: linear" in refused(
        target_modules=["norm"]
    )
    text = refused(target_modules=["mix", "stem"])
    assert "'blocks.0.mix': is a container (ModuleDict), not a layer; inside it: up, down" in text
    assert "'blocks.1.mix': is a container" in text
    base = Nested()
    base.stem.weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.int8), requires_grad=False)
    text = refused(base, target_modules=["stem"])
    assert (
        "'stem': its weight is no plain floating-point parameter (weight: Tensor of int8, bias: Tensor of float32; "
        in text
    )


def test_names_that_match_but_are_left_out_are_explained() -> None:
    text = refused(target_modules=["head"], exclude_modules=["head"])
    assert "1 names match, but none is taken: 'head': left out by exclude_modules" in text
    text = refused(target_modules=["head"], modules_to_save=["head"])
    assert "'head': trained whole by modules_to_save" in text
    text = refused(target_modules=["up"], layers_to_transform=[7])
    assert "layers_to_transform: no targeted module lies in a block 7" in text
    text = refused(target_modules=["up"], layers_to_transform=[1, 7])
    assert text.startswith("some targets match nothing:")
    assert "in a block 7" in text


def test_a_regular_expression_that_matches_no_whole_name_says_how_names_look() -> None:
    text = refused(target_modules="up")
    assert "the regular expression 'up' matches no whole module name" in text
    assert "'.*' stands for any beginning" in text
    assert "'blocks.0.mix.up'" in text or "'stem'" in text or "'head'" in text


def test_all_linear_without_linear_layers_says_so() -> None:
    text = refused(nn.Sequential(nn.ReLU()), target_modules="all-linear")
    assert "'all-linear': the model has no linear layer besides its output layer" in text


def test_patterns_that_fit_no_layer_are_refused() -> None:
    text = refused(config=LoraConfig, target_modules=["up"], rank_pattern={"upp": 3}, alpha_pattern={"head": 2})
    assert "rank_pattern: 'upp' fits no adapted layer" in text
    assert "alpha_pattern: 'head' fits no adapted layer" in text


def test_fan_in_fan_out_without_such_a_layer_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no targeted layer stores its weight as"):
        get_peft_model(Nested(), VeraConfig(r=2, target_modules=["up"], fan_in_fan_out=True))


def test_every_module_gets_a_verdict() -> None:
    base = Nested()
    found = candidates((name, module, parent) for name, module, parent in walk(base) if name)
    verdicts = explain(
        found,
        VeraConfig(r=2, target_modules=["up"], exclude_modules=["blocks.0.mix.up"]),
        frozenset({Need.LINEAR}),
        frozenset(),
    )
    assert [v.name for v in verdicts] == [name for name, _ in base.named_modules() if name]
    by_name = {v.name: v for v in verdicts}
    assert (by_name["blocks.1.mix.up"].taken, by_name["blocks.1.mix.up"].reason) == (True, "its name matches")
    assert (by_name["blocks.0.mix.up"].matched, by_name["blocks.0.mix.up"].taken) == (True, False)
    assert by_name["head"].reason == "its name does not match the targets"


def test_a_plan_changes_nothing_and_knows_the_shapes() -> None:
    base = Nested()
    before = Snapshot.of(base)
    made = plan(base, "x", LoraConfig(r=2, target_modules=["up"], bias="all", modules_to_save=["head"]))
    assert Snapshot.of(base) == before
    assert made.shapes["blocks.0.mix.up"] == {"lora_A": (2, 8), "lora_B": (12, 2), "bias": (12,)}
    assert made.shapes["stem"] == {"bias": (8,)}
    assert list(made.saved) == ["head"]
    model = get_peft_model(base, made.config)
    shapes = {name: tuple(p.shape) for name, p in model.adapter_parameters() if not name.startswith("head.")}
    assert shapes == {f"{layer}.{key}": s for layer, own in made.shapes.items() for key, s in own.items()}


@pytest.mark.parametrize(
    ("names", "name", "expected"),
    [
        (["q"], "q", True),
        (["q"], "a.q", True),
        (["q"], "aq", False),
        (["q"], "q.a", False),
        (["a.q"], "b.a.q", True),
        (["a.q"], "ba.q", False),
        (["a|b"], "a", False),  # names in a list are no expressions
        ("q", "a.q", False),
        (".*q", "a.q", True),
        ("a|b", "b", True),
        ("a|b", "ab", False),
        (None, "q", False),
        ([], "q", False),
    ],
)
def test_the_rule_for_names(names: Any, name: str, expected: bool) -> None:
    assert matches_names(names, name) is expected


ENDLESS = r"(([a-z._0-9])+)+q_pro"
FIELDS: dict[str, AdapterConfig] = {
    "target_modules": VeraConfig(r=2, target_modules=ENDLESS),
    "exclude_modules": LoraConfig(r=2, target_modules="all-linear", exclude_modules=ENDLESS),
    "layers_pattern": LoraConfig(r=2, target_modules=["up"], layers_to_transform=[0], layers_pattern=[ENDLESS]),
    "rank_pattern": LoraConfig(r=2, target_modules=["up"], rank_pattern={ENDLESS: 4}),
    "alpha_pattern": LoraConfig(r=2, target_modules=["up"], alpha_pattern={ENDLESS: 4}),
    "feedforward_modules": Ia3Config(target_modules=["up"], feedforward_modules=ENDLESS),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_pattern_without_end_is_an_error_in_time(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the caller's own: a process would hang for minutes, and nothing could stop it."""
    monkeypatch.setattr(patterns, "LIMIT", 0.4)
    base = nn.ModuleDict({"a_block_with_a_name_of_some_length_and_more": Nested()})
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"{field}: .*takes too long: what a configuration has may take 0.4 s"):
        get_peft_model(base, FIELDS[field])
    assert time.monotonic() - began < 3
    assert not any("lora" in name for name, _ in base.named_modules())


def test_a_pattern_with_groups_and_a_pattern_that_has_none_for_some_names() -> None:
    """The block's number is the last group; a pattern that goes around it finds no block."""
    options = {"target_modules": ["up"], "layers_to_transform": [1]}
    assert taken(**options, layers_pattern="(block)s") == UP[1:]
    with pytest.raises(TargetError, match="no targeted module lies in a block 1"):
        taken(**options, layers_pattern="mix|blocks")


def test_the_default_targets_are_the_papers_query_and_value() -> None:
    pytest.importorskip("transformers")
    model = get_peft_model(tiny_llama(), VeraConfig(r=2))
    assert model.peft_config["default"].target_modules == DEFAULT_TARGETS["llama"] == ("q_proj", "v_proj")
