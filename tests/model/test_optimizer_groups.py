"""optimizer_groups: every trained parameter once, rates where they belong, and PEFT's LoRA+ groups."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from kilotune import (
    AdapterError,
    ConfigError,
    Ia3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_config,
    get_peft_model,
    optimizer_groups,
)
from tests.peft_parity.oracle import base, quiet
from tests.support.models import mlp


class Text(nn.Module):
    """An embedding, a norm, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(self.norm(self.embed(ids)))))


def named(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each group by its name, its parameters by theirs; every trained parameter is in exactly one."""
    names = {id(p): name for name, p in model.named_parameters()}
    inside = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(inside) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert len({group["name"] for group in groups}) == len(groups)
    return {
        g["name"]: {
            "lr": g["lr"],
            "wd": g["weight_decay"],
            "has": {names[id(p)].split("default.")[-1] for p in g["params"]},
        }
        for g in groups
    }


def test_one_adapter_is_one_group() -> None:
    model = get_peft_model(mlp(), VeraConfig(r=4, target_modules="all-linear"))
    assert named(model, optimizer_groups(model, lr=4e-3)) == {
        "adapter": {"lr": 4e-3, "wd": 0.0, "has": {"vera_lambda_b", "vera_lambda_d"}}
    }


def test_the_head_has_its_own_rate_and_norms_and_biases_no_decay() -> None:
    config = LoraConfig(r=2, target_modules=["layer"], bias="lora_only", modules_to_save=["head", "norm"])
    model = get_peft_model(Text(), config)
    groups = named(model, optimizer_groups(model, lr=1e-3, head_lr=1e-2, weight_decay=0.1))
    assert groups == {
        "adapter": {"lr": 1e-3, "wd": 0.1, "has": {"lora_A", "lora_B"}},
        "adapter_no_decay": {"lr": 1e-3, "wd": 0.0, "has": {"bias"}},
        "head": {"lr": 1e-2, "wd": 0.1, "has": {"weight"}},
        "head_no_decay": {"lr": 1e-2, "wd": 0.0, "has": {"weight", "bias"}},
    }
    (head,) = [g for g in optimizer_groups(model, lr=1e-3) if g["name"] == "head"]
    assert head["lr"] == 1e-3
    assert [tuple(p.shape) for p in head["params"]] == [(3, 6)]


def test_lora_plus_and_embeddings() -> None:
    model = get_peft_model(Text(), LoraConfig(r=2, target_modules=["layer", "embed"], use_dora=True))
    groups = named(model, optimizer_groups(model, lr=1e-3, lora_plus_ratio=16, embedding_lr=1e-6, weight_decay=0.1))
    assert groups == {
        "adapter": {"lr": 1e-3, "wd": 0.1, "has": {"lora_A"}},
        "adapter_b": {"lr": 16e-3, "wd": 0.1, "has": {"lora_B"}},
        "adapter_b_no_decay": {"lr": 16e-3, "wd": 0.0, "has": {"lora_magnitude_vector"}},
        "adapter_embedding": {"lr": 1e-6, "wd": 0.1, "has": {"lora_A", "lora_B"}},
        "adapter_embedding_no_decay": {"lr": 1e-6, "wd": 0.0, "has": {"lora_magnitude_vector"}},
    }
    assert set(named(model, optimizer_groups(model, lr=1e-3))) == {"adapter", "adapter_no_decay"}


def test_scales_that_start_at_one_are_not_decayed() -> None:
    model = get_peft_model(mlp(), Ia3Config(target_modules=["0", "2"], feedforward_modules=["2"]))
    groups = named(model, optimizer_groups(model, lr=1e-3, weight_decay=0.1))
    assert groups == {"adapter_no_decay": {"lr": 1e-3, "wd": 0.0, "has": {"ia3_rows", "ia3_cols"}}}


def test_only_what_is_trained_is_in_a_group() -> None:
    model = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"], lora_fa=True))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["2"]))
    (group,) = optimizer_groups(model, lr=1e-3)
    assert [tuple(p.shape) for p in group["params"]] == [(5, 2)]
    model.model.get_submodule("0").base_layer.bias.requires_grad_(True)
    groups = named(model, optimizer_groups(model, lr=1e-3, head_lr=1e-4))
    assert groups["head_no_decay"]["lr"] == 1e-4


@pytest.mark.parametrize(
    "config, options",
    [
        (LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), {"head_lr": 0.01, "lora_plus_ratio": 16.0}),
        (VeraConfig(r=4, target_modules="all-linear", bias="all"), {"weight_decay": 0.1}),
        (LoraConfig(r=2, target_modules="all-linear", use_dora=True), {"lora_plus_ratio": 4}),
    ],
)
def test_a_real_step_moves_each_group_at_its_own_rate(config: Any, options: dict[str, Any]) -> None:
    """Adam's first step is its rate in each entry that has a gradient, whatever the gradient's size."""
    model = get_peft_model(mlp(), config)
    with torch.no_grad():
        for _, p in model.adapter_parameters():
            p.add_(0.1)  # away from zero, so that everything gets a gradient
    groups = optimizer_groups(model, lr=1e-3, **options)
    optimizer = torch.optim.AdamW(groups, eps=1e-12)
    model(torch.linspace(-1, 1, 24).view(4, 6)).square().sum().backward()
    before = {id(p): p.detach().clone() for p in model.parameters()}
    optimizer.step()
    for group in groups:
        for p in group["params"]:
            decayed = before[id(p)] * (1 - group["lr"] * group["weight_decay"])
            step = (p.detach() - decayed)[p.grad != 0].abs()
            torch.testing.assert_close(step, torch.full_like(step, group["lr"]), rtol=1e-3, atol=1e-8)
            assert step.numel() > 0
    held = {id(p) for group in groups for p in group["params"]}
    assert all(torch.equal(p, before[id(p)]) for p in model.parameters() if id(p) not in held)


# -- PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_the_groups_are_those_of_pefts_loraplus(name: str, bias: str) -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "bias": bias}
    ours = get_peft_model(base(name), LoraConfig(**options))
    with quiet():
        theirs = peft.get_peft_model(base(name), peft.LoraConfig(**options))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    mine = optimizer_groups(ours, lr=1e-3, lora_plus_ratio=16.0, weight_decay=0.1)
    assert _sorted(mine) == _sorted([g for g in optimizer.param_groups if g["params"]])


def test_the_groups_are_those_of_pefts_loraplus_with_an_embedding() -> None:
    options: dict[str, Any] = {"r": 4, "target_modules": ["embed", "layer"]}
    ours = get_peft_model(Text(), LoraConfig(**options))
    theirs = peft.get_peft_model(Text(), peft.LoraConfig(**options))
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_lr_embedding=1e-5
    )
    mine = optimizer_groups(ours, lr=1e-3, lora_plus_ratio=8.0, embedding_lr=1e-5)
    shapes = [sorted(tuple(sorted(p.shape)) for p in g["params"]) for g in optimizer.param_groups if g["params"]]
    assert sorted(shapes) == sorted(sorted(tuple(sorted(p.shape)) for p in g["params"]) for g in mine)
    rates = sorted(g["lr"] for g in optimizer.param_groups if g["params"])
    assert rates == sorted(g["lr"] for g in mine)


def _sorted(groups: list[dict[str, Any]]) -> list[tuple[float, float, list[tuple[int, ...]]]]:
    rows = [(g["lr"], g["weight_decay"], sorted(tuple(p.shape) for p in g["params"])) for g in groups]
    return sorted(rows)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head_lr": 1e-3}, r"head_lr: has no effect, because no module is trained whole"),
        ({"lora_plus_ratio": 16}, r"lora_plus_ratio: has no effect, because no trained adapter has a second factor"),
        ({"embedding_lr": 1e-6}, r"embedding_lr: has no effect, because no trained adapter is on an embedding"),
        ({"lora_plus_ratio": 0.5}, r"lora_plus_ratio: expected a number >= 1, got 0.5"),
        ({"weight_decay": -0.1}, r"weight_decay: expected a number >= 0, got -0.1"),
        ({"head_lr": float("nan")}, r"head_lr: expected a number >= 0, got nan"),
    ],
)
def test_what_has_no_effect_or_is_wrong_is_refused(options: dict[str, Any], message: str) -> None:
    model = get_peft_model(mlp(), VeraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError, match=message):
        optimizer_groups(model, 1e-3, **options)


def test_several_faults_come_together() -> None:
    model = get_peft_model(mlp(), VeraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ConfigError) as caught:
        optimizer_groups(model, -1.0, head_lr="fast")  # type: ignore[arg-type]
    assert "lr: expected a number >= 0, got -1.0" in str(caught.value)
    assert "head_lr: expected a number >= 0, got 'fast'" in str(caught.value)


def test_a_model_that_trains_nothing_is_refused() -> None:
    model: PeftModel = get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0"], inference_mode=True))
    with pytest.raises(AdapterError, match="nothing in the model is trained"):
        optimizer_groups(model, 1e-3)


@pytest.mark.parametrize(("structure", "group"), [("did", "adapter"), ("said", "adapter_no_decay")])
def test_a_vector_that_holds_scales_is_not_decayed(structure: str, group: str) -> None:
    model = get_peft_model(mlp(), get_config("intrinsic", d=40, structure=structure, target_modules="all-linear"))
    assert [g["name"] for g in optimizer_groups(model, lr=1e-2, weight_decay=0.1)] == [group]
