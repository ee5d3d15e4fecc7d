"""IA3 beside PEFT's, live: default targets, start, forward, gradients, steps, merging and files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
)
from torch import Tensor, nn

import kilotune
from kilotune.methods.ia3 import ARCHITECTURES
from tests.peft_parity.files import files, peft_load
from tests.peft_parity.oracle import (
    assert_all_close,
    assert_close,
    assert_same,
    base,
    loss_of,
    peft_parameters,
    quiet,
    run,
    weights_of,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "opt": {},
    "gpt2": {},
    "bert": {"task_type": "SEQ_CLS"},
    "mlp": {"target_modules": ["first", "0.1", "0.3"], "feedforward_modules": ["0.3"]},
}


def ours_of(model: kilotune.PeftModel) -> dict[str, nn.Parameter]:
    """Our parameters under PEFT's one name for both kinds of scales."""
    return {re.sub("ia3_(rows|cols)$", "ia3_l", name): p for name, p in model.adapter_parameters()}


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[kilotune.PeftModel, peft.PeftModel]:
    """Both models with equal scales that are not one."""
    ours = kilotune.get_peft_model(base(name, dtype), kilotune.Ia3Config(**OPTIONS[name]))
    with quiet():
        theirs = peft.get_peft_model(base(name, dtype), peft.IA3Config(**OPTIONS[name])).eval()
    mine, other = ours_of(ours), peft_parameters(theirs)
    assert_same({k: tuple(p.shape) for k, p in mine.items()}, {k: tuple(p.shape) for k, p in other.items()}, "shapes")
    assert all(torch.equal(mine[key], other[key]) for key in mine), "starts"
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key in sorted(mine):
            other[key].add_(0.3 * torch.randn(other[key].shape, generator=generator))
            mine[key].copy_(other[key])
    return ours, theirs


def test_the_architectures_are_pefts() -> None:
    targets = {name: set(own[0]) for name, own in ARCHITECTURES.items()}
    forward = {name: set(own[1]) for name, own in ARCHITECTURES.items()}
    assert targets == {k: set(v) for k, v in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items()}
    assert forward == {k: set(v) for k, v in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_forward_gradients_steps_and_merge(name: str) -> None:
    ours, theirs = pair(name)
    with torch.no_grad():
        assert_close(run(ours), run(theirs), "output")
        assert float((run(ours) - run(base(name))).abs().max()) > 1e-3
    sides = (ours_of(ours), peft_parameters(theirs))
    optimizers = [torch.optim.AdamW(side.values(), lr=5e-3, weight_decay=0.1, eps=1e-4) for side in sides]
    for step in range(3):
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            loss_of(model).backward()
        if step == 0:
            gradients = [{key: p.grad for key, p in side.items()} for side in sides]
            assert_all_close(*gradients, "gradient", 1e-4)  # type: ignore[arg-type]
        for optimizer in optimizers:
            optimizer.step()
    assert_all_close(*sides, "value after three steps", 1e-4)
    unmerged = run(ours).detach()
    ours.merge_adapter()
    with quiet():
        theirs.merge_adapter()
    assert_all_close(weights_of(ours), weights_of(theirs), "merged weight")
    assert_close(run(ours), unmerged, "merged output")


def test_bfloat16() -> None:
    """No further from the exact result than twice PEFT's distance, which rounds once too."""
    ours, theirs = pair("mlp", torch.bfloat16)
    with torch.no_grad():
        mine, other = run(ours), run(theirs)
        ours.float()
        exact = run(ours)
    errors = [float((side.float() - exact).norm() / exact.norm()) for side in (mine, other)]
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("name", OPTIONS)
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name)
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft_load(tmp_path / "ours", base(name))  # any warning fails: no key of ours is in the config
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    back = kilotune.PeftModel.from_pretrained(base(name), tmp_path / "theirs")
    with torch.no_grad():
        assert_close(run(loaded), run(theirs), "ours in PEFT")
        assert torch.equal(run(back), run(ours))
    one, other = files(tmp_path / "ours")[1], files(tmp_path / "theirs")[1]
    twice = {key for key in other if ".original_module." in key or ".modules_to_save." in key}
    assert_same(sorted(one), sorted(set(other) - twice), "keys")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_an_architectures_own_feed_forward_names_beside_other_targets(tmp_path: Path) -> None:
    """PEFT fills them in, and then cannot load its own file; ours can be loaded by both."""
    for targets in (["c_proj", "c_attn"], ["c_attn"]):
        ours = kilotune.get_peft_model(base("gpt2"), kilotune.Ia3Config(target_modules=targets))
        with quiet():
            theirs = peft.get_peft_model(base("gpt2"), peft.IA3Config(target_modules=targets))
        shapes = [{k: tuple(p.shape) for k, p in side.items()} for side in (ours_of(ours), peft_parameters(theirs))]
        assert_same(*shapes, "shapes")
        with quiet():
            theirs.save_pretrained(tmp_path / "theirs")
            with pytest.raises(ValueError, match="should be a subset"):
                peft.PeftModel.from_pretrained(base("gpt2"), tmp_path / "theirs")
        kilotune.PeftModel.from_pretrained(base("gpt2"), tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        peft_load(tmp_path / "ours", base("gpt2"))


def test_blocks_and_exclusions_become_names_that_peft_reads(tmp_path: Path) -> None:
    config = kilotune.Ia3Config(layers_to_transform=[1], layers_pattern="layers", exclude_modules=["k_proj"])
    ours = kilotune.get_peft_model(base("llama"), config)
    assert len(ours.adapted_layers()) == 2
    ours.save_pretrained(tmp_path)
    theirs = peft_load(tmp_path, base("llama"))
    assert_same(sorted(ours_of(ours)), sorted(peft_parameters(theirs)), "layers")


class Net(nn.Module):
    """Two convolutions, the second with two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, stride=2)
        self.two = nn.Conv2d(4, 6, (1, 2), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


@pytest.mark.parametrize("forward", [[], ["one"]])
def test_convolutions(forward: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    x, state = torch.randn(2, 3, 7, 8), {k: v.clone() for k, v in net.state_dict().items()}
    options: dict[str, Any] = {"target_modules": ["one", "two"], "feedforward_modules": forward}
    ours = kilotune.get_peft_model(net, kilotune.Ia3Config(**options))
    with torch.no_grad():
        for _, p in ours.adapter_parameters():
            p.add_(torch.randn_like(p) / 3)
    ours.save_pretrained(tmp_path / "ours")
    fresh = Net()
    fresh.load_state_dict(state)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    again = theirs.load_adapter(tmp_path / "ours", "default")
    assert_same((again.missing_keys, again.unexpected_keys), ([], []), "keys")
    assert_close(ours(x), theirs(x), "output")
    theirs.save_pretrained(tmp_path / "theirs")
    last = Net()
    last.load_state_dict(state)
    assert torch.equal(kilotune.PeftModel.from_pretrained(last, tmp_path / "theirs")(x), ours(x))
    merged, expected = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    for key, value in expected.items():
        assert_close(merged[key], value, key)
