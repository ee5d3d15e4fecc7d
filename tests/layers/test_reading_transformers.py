"""Models of transformers that read the weights of layers, or ask them for their dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import LoraConfig, TiedTableWarning, UnusedLayersWarning, get_peft_model
from kilotune.layers.reading import Recipe
from tests.support.models import randomize
from tests.support.readers import change, seeded

transformers = pytest.importorskip("transformers")


def siglip2() -> tuple[nn.Module, dict[str, Any], list[str]]:
    config = transformers.Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_patches=9, patch_size=2
    )
    given = {
        "pixel_values": torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0)),
        "pixel_attention_mask": torch.ones(2, 6, dtype=torch.long),
        "spatial_shapes": torch.tensor([[2, 3], [3, 2]]),
    }
    return transformers.Siglip2VisionModel(config), given, ["position_embedding", "patch_embedding"]


def deberta() -> tuple[nn.Module, dict[str, Any], list[str]]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DebertaConfig(
        vocab_size=30, relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=12, **sizes
    )
    return transformers.DebertaModel(config), {"input_ids": torch.arange(12).view(2, 6)}, ["rel_embeddings"]


@pytest.mark.parametrize("make", [siglip2, deberta])
def test_models_of_transformers(make: Callable[[], tuple[nn.Module, dict[str, Any], list[str]]]) -> None:
    torch.manual_seed(0)
    base, given, targets = make()
    seeded(base).eval()
    given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    plain = copy.deepcopy(base)
    before = plain(**given).last_hidden_state
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    randomize(model.double())
    y = model(**given).last_hidden_state
    for name in model.installed("default").slots():
        assert plain.get_submodule(name) is not None
    wanted = change(model, plain)(**given).last_hidden_state
    assert (wanted - before).abs().max() > 1e-3
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p in model.adapter_parameters())
    torch.testing.assert_close(model.merge_and_unload()(**given).last_hidden_state, wanted)


def t5(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(decoder_start_token_id=0, dropout_rate=0.0, **sizes, **options)
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


IDS = torch.arange(8).view(2, 4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_t5_asks_for_the_dtype_of_a_layer_with_dropout(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built for it, so there is nothing to refuse."""
    monkeypatch.setattr(Recipe, "build", None)
    model = get_peft_model(t5(), LoraConfig(r=2, target_modules=["wo"], lora_dropout=0.1)).train()
    if checkpointing:
        model.model.activation_checkpointing_enable({"use_reentrant": False})
        model.model.enable_input_require_grads()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for _, parameter in model.adapter_parameters())


def test_the_table_that_t5_never_runs_is_told_of_twice_and_merging_changes_no_output() -> None:
    """Its encoder and decoder look up in tables of their own, which are tied to it."""
    before = t5()(input_ids=IDS, labels=IDS).logits
    with pytest.warns(TiedTableWarning, match="'shared' has the same table"):
        model = get_peft_model(t5(), LoraConfig(r=2, target_modules=["shared"]))
    randomize(model)
    with pytest.warns(UnusedLayersWarning, match="1 of 1 layers.*'shared'"):
        y = model.train()(input_ids=IDS, labels=IDS).logits
    torch.testing.assert_close(y, before)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS, labels=IDS).logits, y)
