"""Merging: which adapters, in which order, with what said, and what is left."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import (
    AdapterConfig,
    AdapterError,
    LoraConfig,
    MergeError,
    MergePrecisionWarning,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from kilotune.layers.adapted import AdaptedLayer
from tests.support.guards import merging_is_equal, unmerging_is_exact
from tests.support.models import Nested, Snapshot, bits, mlp, places, randomize

X = torch.linspace(-1, 1, 24).view(4, 6)
BOTH: list[AdapterConfig] = [
    VeraConfig(r=4, target_modules="all-linear", bias="all"),
    LoraConfig(r=2, target_modules="all-linear"),
]
both = pytest.mark.parametrize("config", BOTH, ids=["vera", "lora"])


def three() -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(Nested(), BOTH[0], "a")
    model.add_adapter("b", BOTH[1])
    model.add_adapter("c", VeraConfig(r=3, target_modules=["up"], projection_prng_key=3))
    for seed, name in enumerate("abc"):
        randomize(model, name, seed=seed)
    return model


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_unmerging_gives_the_base_bit_for_bit(config: AdapterConfig, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MergePrecisionWarning)
        unmerging_is_exact(Nested, config, dtype)


@both
def test_the_merged_model_equals_the_unmerged_one(config: AdapterConfig) -> None:
    merging_is_equal(Nested, config, X)


@both
def test_a_hundred_merges_do_not_drift(config: AdapterConfig) -> None:
    model = get_peft_model(mlp(), config)
    randomize(model)
    model.merge_adapter()
    merged = bits(model)
    for _ in range(100):
        model.unmerge_adapter()
        model.merge_adapter()
    assert bits(model) == merged


def test_the_active_adapters_are_merged_by_default_and_others_by_name() -> None:
    model = three()
    outputs = {}
    for name in "abc":
        model.set_adapter(name)
        outputs[name] = model(X)
    model.set_adapter(["a", "b"])
    together = model(X)
    model.merge_adapter()
    assert model.merged_adapters == ["a", "b"]
    torch.testing.assert_close(model(X), together, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.set_adapter([])
    with pytest.raises(MergeError, match="no adapter is active"):
        model.merge_adapter()
    model.merge_adapter(adapter_names=["c"])
    torch.testing.assert_close(model(X), outputs["c"], rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.merge_adapter("b")  # type: ignore[arg-type]  # one name, as people write it
    torch.testing.assert_close(model(X), outputs["b"], rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_and_an_active_one_are_both_on() -> None:
    model = three()
    model.set_adapter(["a", "b"])
    both_on = model(X)
    model.merge_adapter(["b"])
    torch.testing.assert_close(model(X), both_on, rtol=1e-4, atol=1e-4)
    model(X).sum().backward()  # and the unmerged one still trains
    grads = {name: p.grad for name, p in model.adapter_parameters("a")}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def test_unknown_names_are_refused_before_anything_is_merged() -> None:
    model = three()
    before = Snapshot.of(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="no adapter 'd'"):
            merge(adapter_names=["a", "d"])
        assert Snapshot.of(model) == before


def test_merge_and_unload_of_some_drops_the_others() -> None:
    model = three()
    model.set_adapter("c")
    expected = model(X)
    model.set_adapter("a")
    plain = model.merge_and_unload(adapter_names=["c"])
    assert isinstance(plain, Nested)
    torch.testing.assert_close(plain(X), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, AdaptedLayer) for m in plain.modules())
    up, other = plain.get_submodule("blocks.0.mix.up"), plain.get_submodule("stem")
    assert not torch.equal(up.weight, Nested().get_submodule("blocks.0.mix.up").weight)
    assert torch.equal(other.weight, Nested().get_submodule("stem").weight)


def test_merge_and_unload_after_merging_does_not_merge_twice() -> None:
    model = three()
    y = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model.merge_and_unload()(X), y, rtol=1e-4, atol=1e-4)


def test_unload_after_merging_gives_the_base() -> None:
    model = three()
    model.merge_adapter(["a", "b", "c"])
    assert bits(model.unload()) == bits(Nested())


def test_merged_weights_are_new_ones_and_the_old_ones_come_back() -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    before = places(model)
    model.merge_adapter()
    during = places(model)
    assert [name for name in before if before[name] != during[name]] == ["model.0.base_layer.weight"]
    model.unmerge_adapter()
    assert places(model) == before


def test_layers_without_the_adapter_are_left_alone() -> None:
    model = three()
    model.merge_adapter(["c"])
    assert model.adapted_layers()["stem"].merged == ()
    assert model.adapted_layers()["blocks.0.mix.up"].merged == ("c",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_adapter_that_16_bits_round_away_is_warned_of(dtype: torch.dtype) -> None:
    def make(scale: float, where: torch.dtype) -> PeftModel:
        model = get_peft_model(mlp().to(where), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        with torch.no_grad():
            for _, parameter in model.adapter_parameters():
                parameter.mul_(scale)
        return model

    with pytest.warns(
        MergePrecisionWarning, match=r"merging rounded \d+% of the adapter's change in '0' away"
    ) as caught:
        make(0.01, dtype).merge_adapter()
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the caller
    with pytest.warns(MergePrecisionWarning):
        make(0.01, dtype).merge_and_unload()
    make(0.01, torch.float32).merge_adapter()  # warnings are errors here


def test_an_interrupted_merge_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = three()
    y = model(X)
    real, calls = AdaptedLayer.merge, []

    def interrupted(self: AdaptedLayer, names: Any) -> float:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, names)

    monkeypatch.setattr(AdaptedLayer, "merge", interrupted)
    for merge in (model.merge_adapter, model.merge_and_unload):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            merge()
        assert model.merged_adapters == []  # not some layers merged and others not
        assert torch.equal(model(X), y)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    three().merge_and_unload()
    assert capsys.readouterr() == ("", "")
    three().merge_and_unload(progressbar=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "merging" in shown.err


def test_after_merge_and_unload_the_model_is_plain_for_every_tool() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), BOTH[1])
    randomize(model)
    plain = model.merge_and_unload()
    assert [n for n, _ in plain.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(p.requires_grad and p.is_leaf and p.is_contiguous() for p in plain.parameters())
    plain(X).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    assert model.peft_config == {}
    assert model.projections.tensors() == []
