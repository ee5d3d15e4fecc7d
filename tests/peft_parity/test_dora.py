"""DoRA beside PEFT's, live: start, forward, gradients, steps, dropout, merging and files, on four kinds of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import kilotune
from kilotune.methods.dora import MAGNITUDE
from tests.peft_parity.files import check_peft_to_ours, files, scrambled
from tests.peft_parity.oracle import (
    Twins,
    assert_close,
    assert_same,
    base,
    check_forward,
    check_gradients,
    check_merge,
    check_training,
    peft_parameters,
    quiet,
    run,
    twins,
)

TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": None},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "bert": {"target_modules": ["query", "dense"]},
    "mlp": {"target_modules": "all-linear"},
}


def pair(name: str, **options: Any) -> Twins:
    return twins(name, "lora", **{"r": 4, "use_dora": True, **TARGETS[name], **options})


@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("name", TARGETS)
def test_forward_gradients_and_steps(name: str, bias: str) -> None:
    both = pair(name, bias=bias)
    check_forward(both)
    check_gradients(both)
    check_training(both, "adamw")


@pytest.mark.parametrize("name", TARGETS)
def test_merge(name: str) -> None:
    check_merge(pair(name, use_rslora=True, lora_alpha=5))


@pytest.mark.parametrize("name", TARGETS)
def test_the_magnitudes_start_as_pefts(name: str) -> None:
    options = {"r": 4, "use_dora": True, **TARGETS[name]}
    ours = dict(kilotune.get_peft_model(base(name), kilotune.LoraConfig(**options)).adapter_parameters())
    with quiet():
        theirs = peft_parameters(peft.get_peft_model(base(name), peft.LoraConfig(**options)))
    assert_same(sorted(ours), sorted(theirs), "names")
    for key in ours:
        if key.endswith(MAGNITUDE):
            assert_close(ours[key], theirs[key], key, 1e-6)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_dropout_falls_on_the_input_of_the_whole_change(name: str) -> None:
    both = pair(name, lora_dropout=0.5)
    check_forward(both)
    outputs = []
    for model in (both.ours, both.theirs):
        model.train()
        torch.manual_seed(3)
        outputs.append(run(model).detach())
    assert_close(*outputs, "output with dropout")
    both.ours.eval()
    assert not torch.allclose(outputs[0], run(both.ours), atol=1e-4)


def test_bfloat16() -> None:
    """Ours may be no more than 3 times as far from the exact result as PEFT's, which multiplies in float32."""
    both = pair("mlp", dtype=torch.bfloat16)
    check_forward(both, relative=8 * 2.0**-8)
    with torch.no_grad():
        ours, theirs = run(both.ours), run(both.theirs)
        both.ours.float()
        exact = run(both.ours)
    errors = [float((side.float() - exact).norm() / exact.norm()) for side in (ours, theirs)]
    assert errors[0] <= 3 * errors[1] + 2.0**-8


@pytest.mark.parametrize("name", ["mlp", "gpt2", "bert"])
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    options = {"r": 4, "use_dora": True, **TARGETS[name]}
    check_peft_to_ours(name, "lora", torch.float32, options, tmp_path)
    keys = [key for key in files(tmp_path / "ours")[1] if MAGNITUDE in key]
    assert keys
    assert all(key.endswith(f".{MAGNITUDE}") for key in keys)


# -- convolutions and embeddings -------------------------------------------------------------------


class Small(nn.Module):
    """An embedding, a convolution and a layer, each of which the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 9)
        self.conv = nn.Conv2d(1, 4, 3, padding=1, stride=2)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        image = self.embed(ids).unsqueeze(1)  # (batch, 1, ids, 9)
        h = torch.tanh(self.conv(image)).mean(-1).flatten(1)
        return self.head(h[:, :16])


IDS = torch.arange(21).view(3, 7) % 12


@pytest.mark.parametrize("targets", [["conv"], ["embed"], ["conv", "embed", "head"]])
def test_convolutions_and_embeddings(targets: list[str], tmp_path: Path) -> None:
    """Forward, gradients, the merged weights, and files both ways."""
    options: dict[str, Any] = {"r": 3, "use_dora": True, "target_modules": targets}
    nets = []
    for _ in range(4):
        torch.manual_seed(0)
        nets.append(Small())
    ours = scrambled(kilotune.get_peft_model(nets[0], kilotune.LoraConfig(**options)))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(nets[1], tmp_path / "ours", is_trainable=True).eval()
    again = theirs.load_adapter(tmp_path / "ours", "default")
    assert_same((again.missing_keys, again.unexpected_keys), ([], []), "keys")
    with torch.no_grad():
        assert float((ours(IDS) - nets[2](IDS)).abs().max()) > 1e-3
    assert_close(ours(IDS), theirs(IDS), "output")
    gradients = []
    for model in (ours, theirs):
        model.zero_grad()
        model(IDS).square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        gradients.append(sorted(float(g.double().square().sum()) for g in found.values()))
    assert len(gradients[0]) == len(gradients[1]) == 3 * len(targets)
    torch.testing.assert_close(torch.tensor(gradients[0]), torch.tensor(gradients[1]), rtol=1e-4, atol=1e-9)
    theirs.save_pretrained(tmp_path / "theirs")
    back = kilotune.PeftModel.from_pretrained(nets[3], tmp_path / "theirs")
    assert torch.equal(back(IDS), ours.eval()(IDS))
    (_, one), (_, other) = files(tmp_path / "ours"), files(tmp_path / "theirs")
    assert_same(sorted(one), sorted(other), "keys")
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    merged, expected = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    for key, value in expected.items():
        assert_close(merged[key], value, key)


# -- DVoRA, which PEFT does not have ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"save_projection": True}, {"generator": "peft"}, {"sharing": "shape"}])
def test_peft_does_not_load_dvora(options: dict[str, Any], tmp_path: Path) -> None:
    """It would leave the magnitudes out without a word; the file's peft_type is one that it does not know."""
    config = kilotune.VeraConfig(r=5, use_dora=True, target_modules="all-linear", **options)
    model = scrambled(kilotune.get_peft_model(base("mlp"), config))
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="KILOTUNE_VERA"), quiet():
        peft.PeftModel.from_pretrained(base("mlp"), tmp_path)
    again = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path)
    with torch.no_grad():
        exact = "save_projection" not in options  # PEFT's form of the matrices has the gains in them
        assert torch.equal(run(again), run(model)) or not exact
        assert_close(run(again), run(model), "output")
