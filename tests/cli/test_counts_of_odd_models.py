"""Findings of a review: Mamba's dt_proj, what `kilotune inspect` and `plan` count, what `convert` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, get_config, get_peft_model
from kilotune.plan import costs
from tests.support.cli_helpers import as_json, error, kilotune

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "vera": {"r": 2},
    "dora": {"r": 2},
    "bitfit": {},
    "ia3": {"feedforward_modules": []},
    "intrinsic": {"d": 9},
    "unilora": {"r": 2},
}
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])


def _mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


@pytest.mark.parametrize("method", OPTIONS)
def test_adapter_of_mambas_dt_proj_runs(method: str) -> None:
    """The mixer multiplies by dt_proj.weight itself; the adapter must not be left out in silence."""
    with torch.no_grad():
        before = _mamba()(IDS).logits
    model = get_peft_model(_mamba(), get_config(method, target_modules=["dt_proj"], **OPTIONS[method])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(20.0 * torch.randn(parameter.shape, generator=generator))
    adapted: Tensor = model(IDS).logits
    assert (adapted - before).abs().max() > 1e-3
    adapted.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.adapter_parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, adapted, atol=1e-5, rtol=1e-4)


class WavLMAttention(nn.Module):
    """As in transformers: it hands the weights of its layers to torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.q_proj.weight, self.q_proj.bias)


def test_parents_that_read_the_weight_get_the_adapted_one() -> None:
    model = get_peft_model(nn.Sequential(WavLMAttention()), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.fill_(0.5)
    x = torch.randn(3, 4)
    with model.disable_adapter():
        before = model(x)
    expected = before + 4.0 * x.sum(-1, keepdim=True) * 0.5  # alpha 8 / r 2, and B A = 2 * 0.5 * 0.5 everywhere
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(("method", "trained"), [("lora_fa", 4 * 2 * 2), ("loraxs", 4 * 2)])
def test_inspect_counts_no_frozen_factor_as_trained(tmp_path: Path, method: str, trained: int) -> None:
    model = get_peft_model(_two_layers(), get_config(method, r=2, target_modules="all-linear"))
    assert model.report().trainable == trained
    model.save_pretrained(tmp_path / "adapter")
    assert as_json("inspect", tmp_path / "adapter")["trained"] == trained


def test_inspect_knows_an_embeddings_keys(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4))
    model = get_peft_model(net, get_config("lora_fa", r=2, target_modules=["0", "1"]))
    model.save_pretrained(tmp_path / "adapter")
    found = as_json("inspect", tmp_path / "adapter")
    assert (found["layers"], found["trained"]) == (2, model.report().trainable)


def _two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))


@pytest.mark.parametrize(("method", "numbers"), [("lora_fa", 2 * (6 + 4 + 4 + 4)), ("loraxs", 8)])  # LoRA-XS's: shared
def test_a_plan_counts_the_frozen_factors_that_each_adapter_holds(method: str, numbers: int) -> None:
    planned = costs(_two_layers().to("meta"), get_config(method, r=2, target_modules="all-linear"), users=10)
    assert planned.adapter_bytes == 4 * numbers
    assert planned.users_bytes == 40 * numbers


def test_plan_shows_them_so_that_the_rows_add_up() -> None:
    shown = kilotune("plan", "four-layer", "--method", "lora_fa", "--rank", "4").stdout
    rows = {cells[1].strip(): cells[2].strip() for line in shown.splitlines() if len(cells := line.split("│")) > 2}
    parts = ("trainable", "frozen base", "frozen in the adapter")
    assert sum(int(rows[part].replace(",", "")) for part in parts) == int(rows["total"].replace(",", ""))


def test_plan_hints_name_presets_and_methods_with_a_rank() -> None:
    assert "Did you mean 'dora'?" in error("plan", "four-layer", "--method", "dorra")
    said = error("plan", "four-layer", "--method", "houlsby", "--rank", "4")
    assert "unknown option 'r'" in said
    assert "add --method lora" in said
    assert "bottleneck: add" not in said
    assert "bitfit" not in said


def test_converting_to_our_own_form_does_not_claim_that_peft_reads_it() -> None:
    from kilotune.convert import to_kilotune

    model = get_peft_model(_two_layers(), get_config("bitfit", target_modules="all-biased"))
    assert to_kilotune(model).what == "bitfit: only kilotune has a form for it"
