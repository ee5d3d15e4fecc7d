"""One adapter changes a layer, another replaces it whole or what it lies in: each runs as it does alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import (
    AdapterConfig,
    BottleneckConfig,
    LoraConfig,
    PeftModel,
    UnsupportedError,
    VeraConfig,
    get_peft_model,
)
from kilotune.layers.adapted import AdaptedLayer
from kilotune.layers.saved_module import SavedModule
from tests.support.models import Nested, Snapshot, bits, randomize, tiny_llama

X = torch.linspace(-1, 1, 30).view(5, 6)
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=2, target_modules=["stem", "blocks.0.mix.up", "head"]),
    "head": VeraConfig(r=2, target_modules=["stem"], modules_to_save=["head"]),
    "block": VeraConfig(r=2, target_modules=["stem"], modules_to_save=["blocks.0"]),
    "up": LoraConfig(r=2, target_modules=["head"], modules_to_save=["blocks.0.mix.up"]),
    "around": BottleneckConfig(target_modules=["blocks.0"]),
}
ORDERS = [*itertools.permutations(CONFIGS)][::7]


def single(name: str, base: nn.Module | None = None) -> PeftModel:
    """The adapter by itself, with values of its own."""
    model = get_peft_model(Nested() if base is None else base, CONFIGS[name], name)
    randomize(model, name, seed=len(name) + ord(name[0]))
    return model


def together(names: Sequence[str]) -> PeftModel:
    """All in one model, added in this order."""
    model = get_peft_model(Nested(), CONFIGS[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name])
    with torch.no_grad():
        for name in names:
            values = dict(single(name).adapter_parameters(name))
            for key, parameter in model.adapter_parameters(name):
                parameter.copy_(values.pop(key))
            assert not values
    return model


EXPECTED = {name: single(name)(X).detach() for name in CONFIGS}


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_each_runs_as_alone_whoever_came_first_and_the_base_comes_back(names: tuple[str, ...]) -> None:
    model = together(names)
    base = Nested()(X)
    for name in names:
        model.set_adapter(name)
        torch.testing.assert_close(model(X), EXPECTED[name])
        with model.disable_adapter():
            assert torch.equal(model(X), base)
    rows = [*names[:4], None]
    with model.route(rows):
        mixed = model(X)
    for row, who in enumerate(rows):
        torch.testing.assert_close(mixed[row], base[row] if who is None else EXPECTED[who][row])
    for gone, kept in itertools.pairwise(names):
        model.set_adapter(kept)
        model.delete_adapter(gone)
        torch.testing.assert_close(model(X), EXPECTED[kept])
    assert Snapshot.of(model.unload()).bits == Snapshot.of(Nested()).bits


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_one_gives_what_it_gives_alone(name: str) -> None:
    model = together(list(CONFIGS))
    model.set_adapter(name)
    if name != "around":
        model.merge_adapter()
        torch.testing.assert_close(model(X), EXPECTED[name])
        model.unmerge_adapter()
        torch.testing.assert_close(model(X), EXPECTED[name])
        merged = model.merge_and_unload()
        assert not [m for m in merged.modules() if isinstance(m, (AdaptedLayer, SavedModule))]
        torch.testing.assert_close(merged(X), EXPECTED[name])
    else:
        assert bits(model.unload()) == bits(Nested())


def test_a_copy_is_of_the_base_whatever_is_merged_into_it_and_around_it() -> None:
    model = together(["lora", "up", "around"])
    model.set_adapter("lora")
    model.merge_adapter()
    before = Snapshot.of(model)
    model.add_adapter("block", CONFIGS["block"])
    model.add_adapter("head", CONFIGS["head"])
    for name, own in (("block", Nested().blocks[0]), ("head", Nested().head)):
        (saved,) = model.installed(name).saved.values()
        assert bits(saved.modules_to_save[model.installed(name).key]) == bits(own)
    model.delete_adapter("block")
    model.delete_adapter("head")
    assert Snapshot.of(model) == before


def test_those_that_touch_one_module_are_not_active_together() -> None:
    model = together(list(CONFIGS))
    for name, other, where in (
        ("lora", "head", "module 'head': 'head' replaces it whole, and 'lora' changes 'head' in it"),
        ("block", "lora", "module 'blocks.0': 'block' replaces it whole, and 'lora' changes 'blocks.0.mix.up'"),
        ("up", "block", "module 'blocks.0': 'block' replaces it whole, and 'up' changes 'blocks.0.mix.up'"),
        ("block", "around", "module 'blocks.0': 'block' replaces it whole, and 'around' changes 'blocks.0'"),
    ):
        model.set_adapter("head")
        with pytest.raises(UnsupportedError, match="cannot be active together") as refused:
            model.set_adapter([name, other])
        assert where in str(refused.value)
        assert model.active_adapters == ["head"]


def test_one_adapter_cannot_adapt_what_it_replaces() -> None:
    base = Nested()
    base.add_module("again", base.head)  # one module under two names
    before = bits(base)
    config = LoraConfig(r=2, target_modules=["again"], modules_to_save=["head"])
    with pytest.raises(UnsupportedError, match="'again' is to be adapted, and to be trained whole as 'head'"):
        get_peft_model(base, config)
    assert bits(base) == before


def test_files_are_those_of_one_alone(tmp_path: Path) -> None:
    model = together(list(CONFIGS))
    for name in CONFIGS:
        model.save_pretrained(tmp_path / "all", selected_adapters=[name])
        single(name).save_pretrained(tmp_path / "one", selected_adapters=[name])
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "all" / name / file).read_bytes() == (tmp_path / "one" / name / file).read_bytes()
    again = PeftModel.from_pretrained(Nested(), tmp_path / "all" / "block", adapter_name="block")
    for name in ("around", "up", "head", "lora"):
        again.load_adapter(tmp_path / "all" / name, name)
    for name in CONFIGS:
        again.set_adapter(name)
        torch.testing.assert_close(again(X), EXPECTED[name])
        assert copy.deepcopy(again)(X).equal(again(X))


@pytest.mark.parametrize("names", ORDERS, ids="-".join)
def test_a_file_fits_whoever_is_in_the_model_already(names: tuple[str, ...], tmp_path: Path) -> None:
    """A module that is replaced whole was held against the names of the wrappers in it."""
    for name in names:
        single(name).save_pretrained(tmp_path, selected_adapters=[name])
    model = PeftModel.from_pretrained(Nested(), tmp_path / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(tmp_path / name, name)
    for name in names:
        model.set_adapter(name)
        torch.testing.assert_close(model(X), EXPECTED[name])


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("first", ["lora", "whole"])
def test_an_embedding_that_one_adapts_and_another_replaces(first: str, tie: bool) -> None:
    """The pair of public reports: LoRA on a table, and a table of one's own for new tokens."""
    ids = torch.tensor([[1, 5, 7, 2], [3, 3, 9, 4], [6, 1, 0, 8]])
    configs = {
        "lora": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
        "whole": LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    }
    expected, values = {}, {}
    for name, config in configs.items():
        model = get_peft_model(tiny_llama(tie), config, name)
        randomize(model, name, seed=ord(name[0]))
        expected[name] = model(ids).logits.detach()
        values[name] = {key: parameter.detach() for key, parameter in model.adapter_parameters(name)}
    names = [first, *(configs.keys() - {first})]
    model = get_peft_model(tiny_llama(tie), configs[names[0]], names[0])
    model.add_adapter(names[1], configs[names[1]])
    with torch.no_grad():
        for name in names:
            for key, parameter in model.adapter_parameters(name):
                parameter.copy_(values[name][key])
            model.set_adapter(name)
            torch.testing.assert_close(model(ids).logits, expected[name])
        with model.route(["lora", "whole", None]):
            mixed = model(ids).logits
    base = tiny_llama(tie)(ids).logits
    torch.testing.assert_close(mixed, torch.stack([expected["lora"][0], expected["whole"][1], base[2]]))


def test_gradients_of_mixed_rows_are_those_of_each_alone() -> None:
    names = ["lora", "block", "head", "up"]
    model = together(names)
    for name in names:
        for _, parameter in model.adapter_parameters(name):
            parameter.requires_grad_(True)
    with model.route([*names, None]):
        model(X).square().sum().backward()
    for row, name in enumerate(names):
        own = single(name)
        own(X[row : row + 1]).square().sum().backward()
        grads: dict[str, Any] = {key: p.grad for key, p in own.adapter_parameters(name)}
        for key, parameter in model.adapter_parameters(name):
            torch.testing.assert_close(parameter.grad, grads[key], msg=f"{name} {key}")
