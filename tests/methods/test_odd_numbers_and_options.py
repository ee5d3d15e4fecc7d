"""What a review found in the methods: numbers under autocast, rows of zeros, options without an effect, and misuse."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import (
    AdapterError,
    BitfitConfig,
    ConfigError,
    Ia3Config,
    IntrinsicConfig,
    LoraConfig,
    LoraXsConfig,
    PeftModel,
    TargetError,
    TiedTableWarning,
    UniLoraConfig,
    VeraConfig,
    get_peft_model,
    optimizer_groups,
)
from kilotune.config import AdapterConfig
from tests.support.models import mlp

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


def moved(config: AdapterConfig) -> PeftModel:
    """An adapted model whose adapter is away from its start."""
    model = get_peft_model(net(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in model.adapter_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


LINEAR: dict[str, Any] = {"target_modules": "all-linear"}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, **LINEAR),
        LoraConfig(r=3, use_dora=True, **LINEAR),
        VeraConfig(r=3, **LINEAR),
        LoraXsConfig(r=3, **LINEAR),
        UniLoraConfig(theta_d_length=9, **LINEAR),
        IntrinsicConfig(d=9, **LINEAR),
    ],
    ids=["lora", "dora", "vera", "loraxs", "unilora", "intrinsic"],
)
def test_a_merge_inside_autocast_writes_the_same_bits(config: AdapterConfig) -> None:
    model = moved(config)
    model.merge_adapter()
    expected = [p.clone() for p in model.parameters()]
    model.unmerge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


def test_norms_kept_inside_autocast_serve_outside_of_it() -> None:
    model = moved(LoraConfig(r=3, use_dora=True, **LINEAR))
    expected = model(X).detach()  # with gradients, so the norms are taken anew
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(X)
    with torch.no_grad():
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("how", ["fused", "data"])
def test_norms_are_not_stale_after_a_change_that_no_version_counter_sees(how: str) -> None:
    model = moved(LoraConfig(r=3, use_dora=True, **LINEAR))
    optimizer = torch.optim.AdamW([p for _, p in model.adapter_parameters()], lr=0.1, fused=True)
    model(X).square().sum().backward()
    with torch.no_grad():
        before = model(X)  # keeps the norms, between the forward and the step
    if how == "fused":
        optimizer.step()
    else:
        for _, p in model.adapter_parameters():
            p.data.mul_(1.5)
    with torch.no_grad():
        after = model(X)
    assert not torch.allclose(after, before)
    assert torch.equal(after, model(X))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dora_compiles_whole_inside_autocast_and_runs_on_meta(backend: str) -> None:
    model = moved(LoraConfig(r=3, use_dora=True, **LINEAR))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X).detach()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(X).detach(), expected)
    torch._dynamo.reset()
    assert model.to("meta")(X.to("meta")).shape == (5, 6)


def test_dora_keeps_rows_of_zeros_at_zero_while_it_trains() -> None:
    """Their length is 0, so a first step must not give them another one."""
    base = net()
    with torch.no_grad():
        base[0].weight[2:4] = 0.0
    model = get_peft_model(base, LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for _, p in model.adapter_parameters() if p.grad is not None)
        optimizer.step()
    layer = model.adapted_layers()["0"]
    weight = layer.merged_with(["default"]).weight
    assert weight is not None
    assert not weight[2:4].any()
    assert (weight - layer.base_layer.weight)[[0, 1, 4]].abs().max() > 1e-4


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_that_the_method_cannot_start_from_is_refused(value: float) -> None:
    base = net()
    nn.init.constant_(base[0].weight, value)
    with pytest.raises(ConfigError, match=r"the weight of '0' (is all zeros|holds values that are not finite)"):
        get_peft_model(base, LoraXsConfig(r=2, **LINEAR))
    assert type(base[0]) is nn.Linear
    if value == 0.0:
        with pytest.raises(ConfigError, match="'0' is all zeros, so its rows have no direction"):
            get_peft_model(base, LoraConfig(use_dora=True, **LINEAR))
        assert type(base[0]) is nn.Linear


@pytest.mark.parametrize("targets", ["all-linear", "0|2"])
def test_feedforward_names_that_fit_no_layer_are_refused_beside_any_targets(targets: str) -> None:
    with pytest.raises(ConfigError, match=r"feedforward_modules: \['fc3'\] are the ends of no adapted layer's name"):
        get_peft_model(net(), Ia3Config(target_modules=targets, feedforward_modules=["2", "fc3"]))
    model = get_peft_model(net(), Ia3Config(target_modules=targets, feedforward_modules=["2"]))
    assert [name for name, _ in model.adapter_parameters()] == ["0.ia3_rows", "2.ia3_cols"]


@pytest.mark.parametrize("targets", [5, [5], [["a"]]])
def test_ia3_targets_of_a_wrong_type_are_a_fault_like_any_other(targets: Any) -> None:
    with pytest.raises(ConfigError, match="target_modules: expected a list of module names"):
        Ia3Config(target_modules=targets, feedforward_modules=["a"])


def test_the_nearest_word_is_one_that_the_method_has() -> None:
    with pytest.raises(TargetError, match="Did you mean 'all-biased'"):
        get_peft_model(net(), BitfitConfig(target_modules="all-bias"))
    with pytest.raises(TargetError, match="Did you mean 'all-linear'"):
        get_peft_model(net(), LoraConfig(target_modules="all-liner"))


@pytest.mark.parametrize(
    "config", [LoraConfig(use_dora=True, target_modules=["0"]), IntrinsicConfig(target_modules=["0"])]
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch, of the base itself
def test_a_layer_without_numbers_is_refused(config: AdapterConfig) -> None:
    with pytest.raises(TargetError, match=r"its weight is empty: \(0, 3\)"):
        get_peft_model(nn.Sequential(nn.Linear(3, 0)), config)


def test_optimizer_groups_of_a_model_without_adapters_says_so() -> None:
    with pytest.raises(AdapterError, match=r"expected the model of get_peft_model\(\), got a Sequential"):
        optimizer_groups(mlp(), lr=1e-3)  # type: ignore[arg-type]
    compiled: Any = torch.compile(get_peft_model(net(), LoraConfig(**LINEAR)), backend="eager")
    assert [group["name"] for group in optimizer_groups(compiled, lr=1e-3)] == ["adapter"]


class Tied(nn.Module):
    """As T5 and BART: the table's holder is never run itself."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.encoder, self.decoder = (nn.Embedding(7, 4) for _ in range(3))
        self.encoder.weight = self.decoder.weight = self.shared.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids) + self.decoder(ids)


def test_an_adapter_on_a_table_that_others_look_up_in_is_told_of() -> None:
    with pytest.warns(TiedTableWarning, match="'shared' has the same table as 'encoder', 'decoder'"):
        get_peft_model(Tied(), LoraConfig(target_modules=["shared"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(Tied(), LoraConfig(target_modules=["encoder", "decoder"]))
        get_peft_model(Tied(), LoraConfig(target_modules=["shared", "encoder"]))
        get_peft_model(nn.Sequential(nn.Embedding(7, 4)), LoraConfig(target_modules=["0"]))
        with pytest.warns(TiedTableWarning):  # seen through the wrappers of another adapter
            model.add_adapter("second", LoraConfig(target_modules=["shared"]))
