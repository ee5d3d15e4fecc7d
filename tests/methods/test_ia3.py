"""IA3's own: default architectures, which layers scale their input, convolutions, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kilotune import ConfigError, Ia3Config, TargetError, get_peft_model
from tests.support.models import mlp, randomize, tiny_gpt2, tiny_llama

X = torch.linspace(-1, 1, 24).view(4, 6)


def test_an_architectures_defaults() -> None:
    model = get_peft_model(tiny_llama(), Ia3Config())
    shapes = {name.split("layers.")[1]: tuple(p.shape) for name, p in model.adapter_parameters()}
    block = {
        "self_attn.k_proj.ia3_rows": (16, 1),
        "self_attn.v_proj.ia3_rows": (16, 1),
        "mlp.down_proj.ia3_cols": (1, 24),
    }
    assert shapes == {f"{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    assert model.peft_config["default"].feedforward_modules == ("down_proj",)


def test_own_targets_beside_an_architectures_feed_forward_names() -> None:
    for targets, expected in (
        (["c_attn"], ()),
        (["c_attn", "mlp.c_proj"], ("mlp.c_proj",)),
        (["c_proj"], r".*(mlp\.c_proj)"),
    ):
        model = get_peft_model(tiny_gpt2(), Ia3Config(target_modules=targets))
        assert model.peft_config["default"].feedforward_modules == expected
        inputs = [name for name, _ in model.adapter_parameters() if name.endswith("ia3_cols")]
        assert all("mlp.c_proj" in name for name in inputs)
        assert len(inputs) == (2 if expected else 0)


def test_the_bias_goes_with_the_rows_and_not_with_the_columns() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    w0, b0, w1, b1 = (p.detach().double().numpy() for p in net.parameters())
    model = get_peft_model(net, Ia3Config(target_modules=["0", "1"], feedforward_modules=["1"]))
    randomize(model)
    rows, cols = (p.detach().double().numpy().ravel() for _, p in model.adapter_parameters())
    expected = (rows * (X.double().numpy() @ w0.T + b0) * cols) @ w1.T + b1
    np.testing.assert_allclose(model(X).detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(merged[0].bias.detach().numpy(), rows * b0, rtol=1e-6)
    np.testing.assert_allclose(merged[1].bias.detach().numpy(), b1, rtol=1e-6)
    np.testing.assert_allclose(merged[1].weight.detach().numpy(), w1 * cols, rtol=1e-6)


def test_a_convolution_has_one_number_for_each_input_channel() -> None:
    conv = nn.Conv2d(3, 4, (2, 3))
    model = get_peft_model(nn.Sequential(conv), Ia3Config(target_modules=["0"], feedforward_modules=["0"]))
    ((_, scale),) = model.adapter_parameters()
    assert tuple(scale.shape) == (1, 3)
    randomize(model)
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(model(x), conv(x * scale.detach().view(3, 1, 1)))


def test_beside_an_additive_adapter() -> None:
    from kilotune import LoraConfig

    model = get_peft_model(mlp().double(), Ia3Config(target_modules=["0", "2"], feedforward_modules=["2"]))
    model.add_adapter("low", LoraConfig(r=2, target_modules="all-linear"))
    model.double()
    randomize(model)
    randomize(model, "low")
    x = X.double()
    model.set_adapter(["default", "low"])
    both = model(x)
    for order in (["low"], ["default"]):
        model.merge_adapter(order)
        torch.testing.assert_close(model(x), both)
    model.unmerge_adapter()
    assert torch.equal(model(x), both)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"target_modules": ["0", "2"], "feedforward_modules": ["22"]},
            r"feedforward_modules: '22' is not in target_modules. Did you mean '2'",
        ),
        ({"feedforward_modules": 3}, "feedforward_modules: expected a list of module names, got 3"),
        ({"feedforward_modules": "("}, r"feedforward_modules: '\(' is no regular expression"),
        ({"feedforward_modules": "all-linear"}, "is for target_modules only"),
        ({"feedforward_modules": ""}, "feedforward_modules: is an empty string"),
        ({"bias": "all"}, r"bias: expected one of \['none'\]"),
        ({"init_ia3_weights": 1}, "init_ia3_weights: expected bool"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ia3Config(**options)


def test_defaults_of_an_unknown_architecture_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"target_modules and feedforward_modules=None ask for .* no config.model_type"
    ):
        get_peft_model(mlp(), Ia3Config())
    with pytest.raises(ConfigError, match=r"^feedforward_modules=None ask for"):
        get_peft_model(mlp(), Ia3Config(target_modules=["0"]))


def test_a_regular_expression_that_takes_no_layer_has_no_effect() -> None:
    with pytest.raises(TargetError, match="feedforward_modules: 'fc.*' fits no adapted layer"):
        get_peft_model(mlp(), Ia3Config(target_modules=["0"], feedforward_modules="fc.*"))
