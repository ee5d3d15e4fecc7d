"""C3A, FourierFT and MiSS against PEFT, and what they cost and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kilotune import ConfigError, PeftModel, get_config, get_peft_model
from kilotune.methods.c3a import circulant, correlate
from kilotune.projections.streams import distinct_places
from tests.support.models import randomize

peft = pytest.importorskip("peft")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 7))


WAYS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "c3a": ("c3a", peft.C3AConfig, {"block_size": 4, "target_modules": ["0", "2"]}),
    "c3a-pattern": (
        "c3a",
        peft.C3AConfig,
        {"block_size": 2, "block_size_pattern": {"0": 4}, "target_modules": ["0", "2"]},
    ),
    "waveft": ("waveft", peft.WaveFTConfig, {"n_frequency": 9, "target_modules": ["0", "2"]}),
    "waveft-many": ("waveft", peft.WaveFTConfig, {"n_frequency": 96, "target_modules": ["0"]}),
    "waveft-sparse": ("waveft", peft.WaveFTConfig, {"n_frequency": 9, "use_idwt": False, "target_modules": ["0", "2"]}),
    "waveft-odd": ("waveft", peft.WaveFTConfig, {"n_frequency": 20, "target_modules": ["4"]}),
    "miss": ("miss", peft.MissConfig, {"r": 5, "target_modules": ["0", "2"]}),
    "miss-mini": ("miss", peft.MissConfig, {"r": 4, "init_weights": "mini", "mini_r": 2, "target_modules": ["0", "2"]}),
    "fourierft": ("fourierft", peft.FourierFTConfig, {"n_frequency": 9, "target_modules": ["0", "2"]}),
    "fourierft-pattern": (
        "fourierft",
        peft.FourierFTConfig,
        {"n_frequency": 9, "n_frequency_pattern": {"2": 20}, "scaling": 30.0, "target_modules": ["0", "2"]},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_files_both_ways(way: str, tmp_path: Path) -> None:
    """PEFT's file here, and ours in PEFT, with the same outputs; numbers, gradients and all."""
    method, config, options = WAYS[way]
    theirs = peft.get_peft_model(net(), config(**options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    x = torch.randn(5, 3, 12)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(net(), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    mine = [p.grad for p in ours.parameters() if p.requires_grad]
    right = [p.grad for p in theirs.parameters() if p.requires_grad]
    assert len(mine) == len(right)
    # Of PEFT's C3A the last layer's alone: its backward gives an input w_(i + j) for w_(j - i), so all before get wrong
    # gradients (0.21.2); conformance holds ours against finite differences.
    for place in (1,) if method == "c3a" else range(len(mine)):
        torch.testing.assert_close(mine[place], right[place], rtol=1e-4, atol=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "ours")
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-4, atol=1e-4)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_acting_is_the_matrix(size: int) -> None:
    kernel = torch.randn(12 // size, 6 // size, size, dtype=torch.float64)
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    torch.testing.assert_close(correlate(kernel, x), x @ circulant(kernel).T, rtol=0, atol=1e-12)


def test_places_are_all_different_and_those_of_fewer_begin_those_of_more() -> None:
    few, more = distinct_places(7, 1000, 20), distinct_places(7, 1000, 400)
    assert len(set(more.tolist())) == 400
    assert np.array_equal(more[:20], few)
    assert sorted(distinct_places(7, 30, 30).tolist()) == list(range(30))
    assert not np.array_equal(distinct_places(8, 1000, 20), few)
    assert few.tolist()[:4] == GOLDEN  # the same everywhere, for ever


GOLDEN = [634, 910, 747, 449]


def test_what_does_not_fit_is_refused_with_the_layers() -> None:
    with pytest.raises(
        ConfigError, match=r"block_size: expected a divisor[^$]*'0': 5 for \(8, 12\), which have the divisors of 4"
    ):
        get_peft_model(net(), get_config("c3a", block_size=5, target_modules=["0"]))
    with pytest.raises(ConfigError, match=r"'0': r = 13, in = 12\n.*'2': r = 13, in = 8"):
        get_peft_model(net(), get_config("miss", r=13, target_modules=["0", "2"]))
    with pytest.raises(ConfigError, match=r"'2': mini_r = 3 is no divisor of out = 4"):
        get_peft_model(net(), get_config("miss", r=2, init_weights="mini", mini_r=3, target_modules=["2"]))
    with pytest.raises(ConfigError, match="'bat': multiplies blocks"):
        get_config("miss", init_weights="bat")
    with pytest.raises(ConfigError, match="mini_r: has no effect"):
        get_config("miss", mini_r=4)
    with pytest.raises(ConfigError, match=r"n_frequency: more than [^$]*'2': 33 of 4 x 8"):
        get_peft_model(net(), get_config("fourierft", n_frequency=33, target_modules=["2"]))
    with pytest.raises(ConfigError, match="init_weights: expected True, False or one of"):
        get_config("c3a", init_weights="xavier")
    with pytest.raises(ConfigError, match=r"generator: expected one of .* Did you mean"):
        get_config("fourierft", generator="portible")


@pytest.mark.parametrize("method", ["c3a", "fourierft"])
def test_a_forward_builds_no_matrix(method: str) -> None:
    """Neither does a backward: nothing of out x in numbers is kept for it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"block_size": 64} if method == "c3a" else {"n_frequency": 50}
    model = get_peft_model(nn.Sequential(nn.Linear(256, 256)), get_config(method, target_modules=["0"], **options))
    randomize(model)
    for _, parameter in model.adapter_parameters():
        parameter.requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        y = model(torch.randn(2, 256))
    y.sum().backward()
    assert max(n for n in kept if n != 256 * 256) < 256 * 20
    assert kept.count(256 * 256) <= 1  # the base's own weight
