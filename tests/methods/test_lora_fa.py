"""LoRA-FA: A is frozen where it started, through training, files and copies; PEFT reads the file as LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from kilotune import CheckpointError, ConfigError, LoraConfig, PeftModel, get_config, get_peft_model
from kilotune.convert import to_peft
from tests.peft_parity.files import peft_load
from tests.support.models import mlp, randomize

X = torch.linspace(-1, 1, 24).view(4, 6)
CONFIG = LoraConfig(r=2, lora_fa=True, target_modules="all-linear")


def test_only_b_is_trained_and_a_never_moves() -> None:
    model = get_peft_model(mlp(), CONFIG)
    slot = model.adapted_layers()["0"].slot("default")
    assert slot is not None
    a = slot.own()["lora_A"]
    before = a.detach().clone()
    assert before.abs().max() > 0
    assert [name for name, _ in model.adapter_parameters()] == ["0.lora_B", "2.lora_B"]
    assert model.get_nb_trainable_parameters()[0] == 2 * (5 + 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
    assert torch.equal(a, before)
    assert a.grad is None
    assert not a.requires_grad
    model.add_adapter("other", CONFIG)
    model.set_adapter("other")
    model.set_adapter("default")
    assert not a.requires_grad


def test_the_backward_keeps_r_numbers_of_the_input() -> None:
    """With A frozen autograd needs A x (r) for B's gradient, and no x."""
    sizes = {}
    for frozen in (False, True):
        kept: list[int] = []
        config = LoraConfig(r=2, lora_fa=frozen, target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(100, 50)), config)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            model(torch.randn(1000, 100))
        sizes[frozen] = sum(kept)
    assert sizes[False] - sizes[True] >= 1000 * 100
    assert sizes[True] <= 1000 * 2 + 2 * (100 + 50)


def test_the_file_is_pefts_lora_and_comes_back_with_a_frozen(tmp_path: Path) -> None:
    model = get_peft_model(mlp(), get_config("lora_fa", r=2, target_modules="all-linear"))
    randomize(model)
    model.save_pretrained(tmp_path)
    assert "kilotune" not in json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = peft_load(tmp_path, mlp())  # any warning fails
    torch.testing.assert_close(theirs(X), model(X))
    again = PeftModel.from_pretrained(mlp(), tmp_path, is_trainable=True)
    assert again.peft_config["default"].lora_fa is True
    assert [name for name, _ in again.adapter_parameters()] == ["0.lora_B", "2.lora_B"]
    assert torch.equal(again(X), model(X))
    again.save_pretrained(tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert "kilotune_options" in to_peft(model).state[2]


@pytest.mark.parametrize("value, message", [("{", "is no JSON"), ("[1]", r"expected an object, got \[1\]")])
def test_damaged_options_in_the_header_are_refused(value: str, message: str, tmp_path: Path) -> None:
    get_peft_model(mlp(), CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    assert json.loads(metadata["kilotune_options"]) == {"lora_fa": True}
    save_file(load_file(path), path, metadata={**metadata, "kilotune_options": value})
    with pytest.raises(CheckpointError, match=f"kilotune_options in its header.*{message}"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_in_an_embedding_a_is_drawn_and_b_starts_at_zero() -> None:
    """A of zeros, as LoRA starts there, would do nothing for ever once it is frozen."""
    base = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    ids = torch.arange(7)
    before = base(ids).detach()
    model = get_peft_model(base, LoraConfig(r=2, lora_fa=True, target_modules=["0", "1"]))
    assert torch.equal(model(ids), before)
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 + 2 * 2
    frozen = model.adapted_layers()["0"].slot("default").get_parameter("lora_A")
    assert not frozen.requires_grad
    assert frozen.abs().min() > 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    held = frozen.clone()
    model(ids).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(ids), before)
    assert torch.equal(frozen, held)


def test_the_option_is_a_bool() -> None:
    with pytest.raises(ConfigError, match="lora_fa: expected bool, got 1"):
        LoraConfig(lora_fa=1)
