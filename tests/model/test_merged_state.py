"""State dicts, ties and sizes while adapters are merged: right, or refused with nothing changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kilotune import LoraConfig, MergeError, PeftModel, UnsupportedError, VeraConfig, get_peft_model
from kilotune.model.merged_state import MARK
from tests.support.models import Nested, Snapshot, bits, randomize, tiny_llama

X = torch.linspace(-1, 1, 24).view(4, 6)
IDS = torch.tensor([[1, 5, 7, 2]])


def nested(seed: int = 1) -> PeftModel:
    model = get_peft_model(Nested(), LoraConfig(r=2, target_modules=["up", "head"], init_lora_weights=False))
    model.add_adapter("b", VeraConfig(r=3, target_modules=["stem"], init_weights=False))
    randomize(model, seed=seed)
    return model


def llama(tie: bool, *targets: str) -> PeftModel:
    model = get_peft_model(tiny_llama(tie), LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
    randomize(model)
    return model.eval()


# -- state dicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_state_dict_of_a_merged_model_says_so_and_is_not_loaded(
    through_a_file: bool, whole: bool, tmp_path: Path
) -> None:
    """It would apply the adapter twice."""

    def part(model: PeftModel) -> nn.Module:
        return model if whole else model.model

    model = nested()
    plain = part(model).state_dict()
    assert not [key for key in plain if key.endswith(MARK)]
    model.merge_adapter()
    state: dict[str, Tensor] = part(model).state_dict()
    marks = [key for key in state if key.endswith(MARK)]
    assert len(marks) == 3
    assert all(".adapters.default." in key for key in marks)
    if through_a_file:
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
    model.unmerge_adapter()
    for other in (model, nested(7)):
        before = Snapshot.of(other)
        with pytest.raises(MergeError, match=r"taken while adapters were merged \('blocks\.0\.mix\.up' and 2 more\)"):
            part(other).load_state_dict(state)
        assert Snapshot.of(other) == before
        part(other).load_state_dict(plain)
        torch.testing.assert_close(other(X), model(X))


def test_a_merged_state_dict_without_the_adapters_is_the_merged_model() -> None:
    """PEFT's meaning: merge, then export."""
    model = nested()
    y = model(X)
    model.merge_adapter()
    state = model.model.state_dict()
    model.unmerge_adapter()
    plain = Nested()
    plain.load_state_dict({k.replace(".base_layer", ""): v for k, v in state.items() if ".adapters." not in k})
    torch.testing.assert_close(plain(X), y)


@pytest.mark.parametrize("assign", [False, True])
def test_nothing_is_loaded_into_merged_layers(assign: bool) -> None:
    """Unmerging would undo it."""
    model = nested()
    state = {key: value + 1 for key, value in model.state_dict().items()}
    model.merge_adapter()
    before = Snapshot.of(model)
    for given in (state, {k: v for k, v in state.items() if ".up.adapters." in k}):
        with pytest.raises(MergeError, match=r"\['default'\] are merged into 'blocks\.0\.mix\.up', so unmerge_adapter"):
            model.load_state_dict(given, strict=False, assign=assign)
        assert Snapshot.of(model) == before
    others = {k: v for k, v in state.items() if k.startswith("model.stem.base_layer.")}
    model.load_state_dict(others, strict=False)
    model.unmerge_adapter()
    torch.testing.assert_close(model.state_dict()["model.stem.base_layer.weight"], Nested().stem.weight.detach() + 1)
    assert torch.equal(model.state_dict()["model.head.base_layer.weight"], Nested().head.weight.detach())
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_copies_watch_as_well_and_unloading_takes_it_away() -> None:
    model = copy.deepcopy(nested())
    model.merge_adapter()
    with pytest.raises(MergeError, match="merged"):
        model.load_state_dict(model.state_dict())
    again = copy.deepcopy(model)
    plain = again.merge_and_unload()
    assert set(plain.__dict__) == set(Nested().__dict__)
    assert not plain._state_dict_hooks
    assert not plain._load_state_dict_pre_hooks
    plain.load_state_dict(Nested().state_dict())
    assert bits(plain) == bits(Nested())
    model.unmerge_adapter()
    assert bits(model.unload()) == bits(Nested())


def test_trl_s_order_of_weight_sync_gives_the_merged_weights() -> None:
    """Merge, go through the named parameters, unmerge: what its trainers send to the engine that generates."""
    model = llama(True, "q_proj", "down_proj")
    y = model(input_ids=IDS).logits
    before = Snapshot.of(model)
    sent: dict[str, Tensor] = {}
    model.merge_adapter()
    for name, parameter in model.named_parameters():
        if ".adapters." not in name:
            sent[name.removeprefix("model.").replace(".base_layer", "")] = parameter.data.clone()
    model.unmerge_adapter()
    assert Snapshot.of(model) == before
    engine = tiny_llama(True, seed=9)
    missing = engine.load_state_dict(sent, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]  # tied
    assert missing.unexpected_keys == []
    engine.tie_weights()
    torch.testing.assert_close(engine.eval()(input_ids=IDS).logits, y)


# -- ties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
@pytest.mark.parametrize("inner", [False, True])
def test_weights_are_not_tied_while_merged_and_are_afterwards(target: str, inner: bool) -> None:
    model = llama(True, target)
    y = model(input_ids=IDS).logits
    model.merge_adapter()
    before = Snapshot.of(model)
    tied: Any = model.get_base_model().model if inner else model
    with pytest.raises(MergeError, match=r"tie_weights: \['default'\] are merged"):
        tied.tie_weights()
    assert Snapshot.of(model) == before
    model.unmerge_adapter()
    tied.tie_weights()
    torch.testing.assert_close(model(input_ids=IDS).logits, y)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, tiny_llama(True).eval()(input_ids=IDS).logits)
    plain = model.merge_and_unload()
    assert "tie_weights" not in plain.__dict__
    assert "tie_weights" not in plain.model.__dict__


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_table_with_an_adapter_is_not_resized_by_half(tie: bool, target: str, saved: bool) -> None:
    """transformers resizes the embedding, and then finds that the head is none that it knows."""
    config = LoraConfig(
        r=2, target_modules=["q_proj"] if saved else [target], modules_to_save=[target] if saved else None
    )
    model = get_peft_model(tiny_llama(tie), config)
    before = Snapshot.of(model)
    where = "input embedding" if target == "embed_tokens" else "output layer"
    for one in (model, model.get_base_model()):
        with pytest.raises(UnsupportedError, match=f"adapters are on the {where} of this model"):
            one.resize_token_embeddings(40)
        assert Snapshot.of(model) == before
    model.delete_adapter("default")
    assert model.resize_token_embeddings(40).weight.shape == (40, 16)


def test_a_model_without_adapters_on_its_tables_is_resized() -> None:
    model = llama(True, "q_proj")
    y = model(input_ids=IDS).logits
    model.resize_token_embeddings(40)
    torch.testing.assert_close(model(input_ids=IDS).logits[..., :32], y)
