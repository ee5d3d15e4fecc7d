"""LoRA's starts: the factors themselves, in float64 and against other formulas, and what an adapter makes of them."""

from __future__ import annotations

import pytest
import torch

from kilotune import ConfigError, LoraConfig, get_peft_model
from kilotune.kernels.starts import orthogonal
from tests.support.models import mlp

X = torch.linspace(-1, 1, 24).view(4, 6)
CPU = torch.device("cpu")


# -- orthogonal ------------------------------------------------------------------------------------


def test_orthogonal_factors_are_not_zero_and_their_product_is() -> None:
    torch.manual_seed(0)
    a, b = orthogonal(6, 40, 30, CPU)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((6, 30), (40, 6), torch.float32, torch.float32)
    # Each is r / 2 normal directions of deviation 1 / 10, spread over the rank's r by orthonormal rows.
    for factor in (a, b.T):
        values = torch.linalg.svdvals(factor.double())
        assert values[3:].max() < 1e-6
        assert float(values[2]) > 0.1
    spread = torch.cat([orthogonal(6, 400, 300, CPU)[i].flatten() for i in (0, 1) for _ in range(20)])
    assert float(spread.square().mean().sqrt()) == pytest.approx(0.1 * 0.5**0.5, rel=0.02)
    assert float((b.double() @ a.double()).abs().max()) < 1e-7


def test_an_orthogonal_start_leaves_the_output_and_trains_both_factors() -> None:
    base = mlp()
    before = base(X).detach()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="orthogonal"))
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-6)
    model(X).square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 1e-6, name


@pytest.mark.parametrize("options", [{"r": 3}, {"r": 4, "rank_pattern": {"0": 1}}])
def test_an_orthogonal_start_needs_even_ranks(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="init_lora_weights='orthogonal': needs even ranks, got (r = 3|.*'0'.* = 1)"):
        LoraConfig(init_lora_weights="orthogonal", **options)
