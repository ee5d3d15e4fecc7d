"""target_parameters of layers' own weights, an architecture's own targets beside them, and long lists of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kilotune.peft as ours
from kilotune.errors import ConfigError, TargetError
from kilotune.peft.targets import minimal
from kilotune.peft.tuners.lora import LoraLayer
from tests.peft.both import IDS, alike, filled, logits
from tests.peft_parity.oracle import quiet
from tests.support.models import mlp, tiny_llama

WEIGHTS = ["gate_proj.weight", "model.layers.1.self_attn.o_proj.weight"]


def on_weights(library: Any, **options: Any) -> Any:
    config = library.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=WEIGHTS, **options)
    model = library.get_peft_model(tiny_llama(), config)
    filled(library, model, "default")
    return model


def test_a_layers_own_weight_is_adapted_as_by_peft() -> None:
    def script(library: Any) -> dict[str, Any]:
        model = on_weights(library)
        out = logits(model)
        state = library.get_peft_model_state_dict(model)
        named = [sorted(model.targeted_module_names), sorted(model.targeted_parameter_names)]
        merged = model.merge_and_unload()(input_ids=IDS).logits.detach()
        return {"out": out, "merged": merged, "keys": sorted(state), "named": named}

    alike(script)


def test_files_of_such_adapters_are_read_by_both(tmp_path: Path) -> None:
    import peft

    with quiet():
        libraries = (ours, peft)
        models = [on_weights(library) for library in libraries]
        for name, model in zip(("ours", "theirs"), models, strict=True):
            model.save_pretrained(tmp_path / name)
        found = [
            logits(lib.PeftModel.from_pretrained(tiny_llama(), tmp_path / n))
            for n in ("ours", "theirs")
            for lib in libraries
        ]
    for value in found:
        torch.testing.assert_close(value, logits(models[0]), atol=1e-5, rtol=1e-5)


def test_the_configuration_that_was_given_stays_as_it_is_and_may_be_used_again() -> None:
    config = ours.LoraConfig(target_modules=[], target_parameters=["0.weight"])
    model = ours.get_peft_model(mlp(), config)
    model.add_adapter("other", config)
    assert (config.target_modules, config.target_parameters) == (set(), ["0.weight"])
    assert model.targeted_parameter_names == ["0.weight"]
    assert model.targeted_module_names == []
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert model.targeted_parameter_names == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lora_dropout": 0.1}, "name '0' in target_modules"),
        ({"use_dora": True}, "name '0' in target_modules"),
        ({"bias": "lora_only"}, "name '0' in target_modules"),
        ({"target_modules": ["0"]}, "name '0' in target_modules"),
        ({"rank_pattern": {"weight": 2}}, "name '0' in target_modules"),  # PEFT's pattern fits the parameter's name
        ({"exclude_modules": ["0"], "target_modules": ["2"]}, "name '0' in target_modules"),
    ],
)
def test_what_is_not_the_same_on_a_layer_is_refused(options: dict[str, Any], why: str) -> None:
    given = {"target_modules": [], "target_parameters": ["0.weight"], **options}
    with pytest.raises(TargetError, match=why):
        ours.get_peft_model(mlp(), ours.LoraConfig(**given))


def test_a_bias_and_an_attentions_own_layer_are_no_such_weights() -> None:
    with pytest.raises(TargetError, match="0.bias"):
        ours.get_peft_model(mlp(), ours.LoraConfig(target_modules=[], target_parameters=["0.bias"]))
    base = nn.ModuleDict({"mha": nn.MultiheadAttention(4, 2)})
    with pytest.raises(TargetError, match="out_proj"):
        ours.get_peft_model(base, ours.LoraConfig(target_modules=[], target_parameters=["out_proj.weight"]))


def test_beside_parameters_an_architectures_own_targets_are_taken_as_by_peft() -> None:
    def script(library: Any) -> list[str]:
        config = library.LoraConfig(target_parameters=["gate_proj.weight"])
        model = library.get_peft_model(tiny_llama(), config)
        return sorted(library.get_peft_model_state_dict(model))

    alike(script)


def test_a_state_does_not_tell_parameters_from_layers() -> None:
    config = ours.LoraConfig(target_modules=[], target_parameters=["0.weight"])
    state = ours.get_peft_model_state_dict(ours.get_peft_model(mlp(), config))
    with pytest.raises(ConfigError, match="do not tell parameters"):
        ours.inject_adapter_in_model(config, mlp(), state_dict=state)


# -- long lists ------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, count: int = 21) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2), "k": nn.Linear(2, 2)}) for _ in range(count)])
        self.other = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(count)])


def test_a_long_list_of_names_becomes_the_endings_that_take_the_same() -> None:
    names = [f"blocks.{i}.k" for i in range(21)]
    model = ours.get_peft_model(Blocks(), ours.LoraConfig(target_modules=names))
    assert model.peft_config["default"].target_modules == {"k"}
    assert sorted(model.targeted_module_names) == sorted(names)
    names = [f"blocks.{i}.q" for i in range(21)]
    model = ours.get_peft_model(Blocks(), ours.LoraConfig(target_modules=names))
    assert sorted(model.targeted_module_names) == sorted(names)
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 21


def test_a_list_that_names_what_is_not_there_stays_as_it_is() -> None:
    names = [*(f"blocks.{i}.k" for i in range(21)), "blocks.99.k"]
    with pytest.warns(UserWarning, match=r"blocks\.99\.k"):
        model = ours.get_peft_model(Blocks(), ours.LoraConfig(target_modules=names))
    assert model.peft_config["default"].target_modules == set(names)


def test_the_shortest_endings_are_those_of_peft() -> None:
    from peft.tuners.tuners_utils import _find_minimal_target_modules as theirs

    cases: list[tuple[list[str], list[str]]] = [
        (["a.q", "b.q"], ["a.k", "b.k", "a", "b"]),
        (["a.0.q", "a.1.q"], ["b.0.q"]),
        (["m.x.proj", "m.proj"], ["m.time_proj", "m"]),
        (["q"], ["a.q"]),
    ]
    for targets, others in cases:
        assert minimal(targets, others) == theirs(targets, others)
    for wrong in ("q", [], ["q", ""]):
        with pytest.raises(ConfigError, match="expected names of modules"):
            minimal(wrong, ["k"])
    with pytest.raises(ConfigError, match="targets and are not: q"):
        minimal(["q"], ["q"])
