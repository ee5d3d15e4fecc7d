"""Where we differ from PEFT on purpose: both sides of each row of the table in docs/peft.md, live.

A row that stops being true (because PEFT mends it) fails here, and the page is to be changed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kilotune
from tests.peft_parity.files import check_outputs, files
from tests.peft_parity.oracle import (
    METHODS,
    Twins,
    assert_close,
    base,
    loss_of,
    peft_parameters,
    quiet,
    run,
    twins,
)

ALL: dict[str, Any] = {"r": 4, "target_modules": "all-linear"}


def added(both: Twins, **options: Any) -> None:
    """A second LoRA adapter on both sides."""
    both.ours.add_adapter("other", kilotune.LoraConfig(**options))
    with quiet():
        both.theirs.add_adapter("other", peft.LoraConfig(**options))


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return run(model).clone()


def test_inactive_adapters_have_no_gradient() -> None:
    both = twins("mlp", "lora", **ALL)
    added(both, r=2, target_modules=["first"])
    for model in (both.ours, both.theirs):
        loss_of(model).backward()
        model.set_adapter("other")
    assert all(p.grad is None for _, p in both.ours.adapter_parameters("default"))
    assert any(p.grad is not None for p in peft_parameters(both.theirs, "default").values())


def test_unmerging_gives_the_bits_back() -> None:
    both = twins("mlp", "lora", **ALL)
    plain = base("mlp").first.weight
    for model, exact in ((both.ours, True), (both.theirs, False)):
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(model.get_base_model().first.base_layer.weight, plain) is exact


def test_disabling_while_merged() -> None:
    both = twins("mlp", "lora", **ALL)
    plain = output(base("mlp"))
    for model, exact, stays in ((both.ours, True, True), (both.theirs, False, False)):
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(output(model), plain) is exact
        merged = model.get_base_model().first.merged
        assert bool(merged) is stays


def test_merging_twice() -> None:
    both = twins("mlp", "lora", **ALL)
    both.ours.merge_adapter()
    both.theirs.merge_adapter()
    with pytest.raises(kilotune.MergeError, match="merged already"):
        both.ours.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        both.theirs.merge_adapter()


def _tied() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def test_merging_a_tied_weight() -> None:
    """PEFT adds the change to the embedding as well, so the merged model is another one."""
    models = []
    for library, config in ((kilotune, kilotune.LoraConfig), (peft, peft.LoraConfig)):
        with quiet():
            model = library.get_peft_model(_tied(), config(r=4, target_modules=["lm_head"], init_lora_weights=False))
        before = output(model.eval())
        with quiet():
            merged = model.merge_and_unload()
        models.append((before, output(merged)))
    (ours, merged_ours), (theirs, merged_theirs) = models
    assert_close(merged_ours, ours, "merged output")
    assert not torch.allclose(merged_theirs, theirs, atol=1e-2)


def test_a_trained_bias_belongs_to_its_adapter() -> None:
    both = twins("mlp", "vera", bias="vera_only", **ALL)
    plain = output(base("mlp"))
    with both.ours.disable_adapter():
        assert torch.equal(output(both.ours), plain)
    with quiet(), both.theirs.disable_adapter():
        assert not torch.allclose(output(both.theirs), plain, atol=1e-3)


def test_vera_adapters_side_by_side() -> None:
    first = {"r": 8, "target_modules": ["first"], "projection_prng_key": 1}
    seconds: dict[str, dict[str, Any]] = {
        "key": {**first, "projection_prng_key": 2},
        "larger targets": {**first, "target_modules": "all-linear"},
        "higher rank": {**first, "r": 16},
        "lower rank": {**first, "r": 4},
    }
    ours = kilotune.get_peft_model(base("mlp"), kilotune.VeraConfig(**first, init_weights=False))
    for name, options in seconds.items():
        ours.add_adapter(name, kilotune.VeraConfig(**options, init_weights=False))
        ours.set_adapter([name, "default"])
        assert torch.isfinite(output(ours)).all()
        theirs = peft.get_peft_model(base("mlp"), peft.VeraConfig(**first))
        with pytest.raises((ValueError, RuntimeError)):  # when it is added, or when it is called
            _added_and_called(theirs, name, peft.VeraConfig(**options))


def _added_and_called(model: peft.PeftModel, name: str, config: peft.PeftConfig) -> None:
    model.add_adapter(name, config)
    model.set_adapter(name)
    output(model)


def test_vera_and_lora_together() -> None:
    both = twins("mlp", "vera", **ALL)
    both.ours.add_adapter("second", kilotune.LoraConfig(init_lora_weights=False, **ALL))
    single = output(both.ours)
    both.ours.set_adapter(["default", "second"])
    assert not torch.allclose(output(both.ours), single, atol=1e-3)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        both.theirs.add_adapter("second", peft.LoraConfig(**ALL))


def test_an_adapter_called_like_a_layer(tmp_path: Path) -> None:
    """PEFT takes the layer's tensors for those of the other adapter, and leaves them out."""
    both = twins("mlp", "lora", **ALL)
    config = {"r": 2, "target_modules": ["head"]}
    both.ours.add_adapter("first", kilotune.LoraConfig(**config))
    with quiet():
        both.theirs.add_adapter("first", peft.LoraConfig(**config))
        both.theirs.save_pretrained(tmp_path / "theirs")
    both.ours.save_pretrained(tmp_path / "ours")
    keys = {side: set(files(tmp_path / side)[1]) for side in ("ours", "theirs")}
    assert {key.split(".")[2] for key in keys["ours"] - keys["theirs"]} == {"first"}


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_layers_to_transform(method: str) -> None:
    """With whole names PEFT does not apply it; nor does it see a list of blocks at the root of a model."""
    ours_cls, theirs_cls = METHODS[method]
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    options: dict[str, Any] = {"r": 2, "target_modules": names, "layers_to_transform": [1]}
    ours = kilotune.get_peft_model(base("llama"), ours_cls(**options))
    with quiet():
        theirs = peft.get_peft_model(base("llama"), theirs_cls(**options))
    assert list(ours.adapted_layers()) == names[1:]
    assert {k.rpartition(".")[0] for k in peft_parameters(theirs)} == set(names)
    options = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    inner = [base("llama").model for _ in range(2)]
    assert list(kilotune.get_peft_model(inner[0], ours_cls(**options)).adapted_layers()) == [
        "layers.1.self_attn.q_proj"
    ]
    with quiet(), pytest.raises(ValueError, match="not found in the base model|No layers types compatible"):
        peft.get_peft_model(inner[1], theirs_cls(**options))


def test_configs_stay_as_they_are() -> None:
    ours, theirs = kilotune.LoraConfig(**ALL), peft.LoraConfig(**ALL)
    before = copy.deepcopy((ours, theirs))
    kilotune.get_peft_model(base("mlp"), ours)
    peft.get_peft_model(base("mlp"), theirs)
    assert ours == before[0]
    assert theirs != before[1]


def test_a_batch_of_several_adapters_is_not_dropped_in_silence() -> None:
    both = twins("mlp", "vera", **ALL)
    x = torch.ones(2, 12)
    with torch.no_grad():
        assert torch.equal(both.theirs(x, adapter_names=["default", "__base__"]), both.theirs(x))
    with torch.no_grad():
        routed, own = both.ours(x, adapter_names=["default", "__base__"]), both.ours(x)
        with both.ours.disable_adapter():
            base = both.ours(x)
    assert torch.allclose(routed[0], own[0], atol=1e-6)
    assert torch.allclose(routed[1], base[1], atol=1e-6)
    assert not torch.allclose(own[1], base[1], atol=1e-3)


def test_outputs_of_the_small_check() -> None:
    """The comparison used above sees a difference."""
    both = twins("mlp", "vera", **ALL)
    check_outputs(both.ours, both.theirs)
    with pytest.raises(AssertionError, match="output"):
        check_outputs(both.ours, base("mlp"))
