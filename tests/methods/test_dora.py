"""DoRA's own: gradients with the norm held constant, norms that are kept and never stale, zero rows, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kilotune
from kilotune import ConfigError, LoraConfig, PeftModel, UnsupportedError, VeraConfig, get_config, get_peft_model
from kilotune.convert import to_lora, to_peft
from kilotune.deltas import LowRank
from kilotune.methods import METHODS, LowRankConfig, dora
from kilotune.methods.dora import MAGNITUDE, Dora, row_norms
from tests.support.models import mlp, randomize

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


def model_of(config: kilotune.AdapterConfig | None = None, dtype: torch.dtype = torch.float64) -> PeftModel:
    config = config or LoraConfig(r=2, use_dora=True, target_modules="all-linear")
    model = get_peft_model(mlp().to(dtype), config).to(dtype)
    randomize(model)
    return model


def method_in(model: PeftModel) -> Dora:
    method = model.installed("default").method
    assert isinstance(method, Dora)
    return method


# -- values and gradients --------------------------------------------------------------------------


def test_gradients_take_the_norm_for_a_constant() -> None:
    """Finite differences of the formula in which the norm stays as it is (section 4.3 of the paper)."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 5)).double(), LoraConfig(r=2, lora_alpha=6, target_modules=["0"], use_dora=True)
    )
    model.double()
    randomize(model)
    base = model.adapted_layers()["0"].base_layer
    params = {name: p.detach().numpy() for name, p in model.adapter_parameters()}
    weight, bias, x = (t.detach().numpy() for t in (base.weight, base.bias, X))

    def moved(own: dict[str, Any]) -> Any:
        return weight + 3.0 * own["0.lora_B"] @ own["0.lora_A"]

    norm = np.linalg.norm(moved(params), axis=1)

    def loss(own: dict[str, Any]) -> float:
        scale = own[f"0.{MAGNITUDE}"] / norm
        return float((np.tanh(x @ (scale[:, None] * moved(own)).T + bias) ** 2).sum())

    model(X).tanh().square().sum().backward()
    for name, p in model.adapter_parameters():
        assert p.grad is not None
        for index in np.ndindex(*p.shape):
            up, down = copy.deepcopy(params), copy.deepcopy(params)
            up[name][index] += 1e-6
            down[name][index] -= 1e-6
            assert abs((loss(up) - loss(down)) / 2e-6 - float(p.grad[index])) < 1e-6, (name, index)


def test_over_a_zero_change_it_is_the_method_inside_times_the_trained_length() -> None:
    model = get_peft_model(mlp(), get_config("dora", r=2, target_modules=["0"]))
    layer = model.adapted_layers()["0"]
    lengths = dict(model.adapter_parameters())[f"0.{MAGNITUDE}"]
    torch.testing.assert_close(lengths.detach(), layer.base_layer.weight.norm(dim=1))
    with torch.no_grad():
        lengths.mul_(2.0)
    x = X.float()
    torch.testing.assert_close(layer(x), 2 * (layer.base_layer(x) - layer.base_layer.bias) + layer.base_layer.bias)


@pytest.mark.parametrize("block", [1, 7, 20, 2**24])
def test_norms_in_blocks_are_those_of_the_whole_matrix(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    w, a, b, d, o = (torch.randn(s, generator=generator).double() for s in ((7, 5), (3, 5), (7, 3), (3,), (7,)))
    w[2], o[2] = 0.0, 0.0
    expected = np.linalg.norm((w + o[:, None] * (b * d) @ a * 1.5).numpy(), axis=1)
    found = row_norms(w.requires_grad_(), LowRank(a, b, d, o, 1.5))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert not found.requires_grad


def test_rows_of_zeros_stay_finite_and_zero() -> None:
    net = nn.Sequential(nn.Linear(6, 5))
    with torch.no_grad():
        net[0].weight[1:3] = 0.0
        expected = net(X.float())
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], use_dora=True))
    assert torch.equal(model(X.float()), expected)
    model(X.float()).sum().backward()
    for name, p in model.adapter_parameters():
        assert torch.isfinite(p.grad).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_start_is_the_base_to_the_bit(dtype: torch.dtype) -> None:
    base = mlp().to(dtype)
    x = X.to(dtype)
    expected = base(x)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    lengths = [p for name, p in model.adapter_parameters() if name.endswith(MAGNITUDE)]
    assert len(lengths) == 2
    assert all(p.dtype == torch.float32 for p in lengths)
    assert torch.equal(model(x), expected)


def test_dropout_falls_on_the_whole_change() -> None:
    """y = W x + (W' - W) drop(x): with an input that is dropped whole, the base alone."""
    model = model_of(LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=0.5))
    layer = model.adapted_layers()["0"]
    slot = layer.slot("default")
    assert slot is not None
    slot.drop = lambda x: torch.zeros_like(x)  # type: ignore[method-assign]
    torch.testing.assert_close(layer(X), layer.base_layer(X))


def test_autograd_keeps_no_matrix_of_the_weights_size() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(300, 200)), LoraConfig(r=2, target_modules=["0"], use_dora=True))
    kept: list[tuple[int, ...]] = []
    weight = model.adapted_layers()["0"].base_layer.weight

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() != weight.data_ptr():
            kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(4, 300))
    assert kept
    assert max(int(np.prod(shape)) for shape in kept) <= 4 * 300


# -- norms that are kept ---------------------------------------------------------------------------


def fresh(model: PeftModel, x: Tensor) -> Tensor:
    """The output with norms that are taken anew."""
    with torch.enable_grad():
        return model(x).detach()


def test_without_gradients_norms_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = model_of(), []
    plain = row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: taken.append(1) or plain(*args))
    with torch.no_grad():
        first, second = model(X), model(X)
    assert len(taken) == 2  # two layers
    assert torch.equal(first, second)
    with torch.inference_mode():
        assert torch.equal(model(X), first)
    assert len(taken) == 2
    model(X)
    assert len(taken) == 4  # with gradients they are taken anew, and what was kept is dropped
    with torch.no_grad():
        model(X)
    assert len(taken) == 6


def _step(model: PeftModel) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None  # no forward with gradients comes in between
    optimizer.step()


def _in_place(model: PeftModel) -> None:
    with torch.no_grad():
        dict(model.adapter_parameters())["0.lora_B"].add_(1.0)


def _new_data(model: PeftModel) -> None:
    p = dict(model.adapter_parameters())["0.lora_B"]
    p.data = p.detach() + 1.0


def _load(model: PeftModel) -> None:
    model.load_state_dict({key: value + 0.25 for key, value in model.state_dict().items()})


def _assign(model: PeftModel) -> None:
    state = {key: value + 0.25 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _base(model: PeftModel) -> None:
    with torch.no_grad():
        model.adapted_layers()["0"].base_layer.weight.mul_(1.5)


def _new_base(model: PeftModel) -> None:
    layer = model.adapted_layers()["0"].base_layer
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)


@pytest.mark.parametrize("change", [_step, _in_place, _new_data, _load, _assign, _base, _new_base])
def test_kept_norms_are_never_stale(change: Callable[[PeftModel], None]) -> None:
    model = model_of()
    with torch.no_grad():
        before = model(X)
        change(model)
        after = model(X)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(model, X))


def test_they_follow_dtypes_merging_and_other_adapters() -> None:
    model = model_of()
    with torch.no_grad():
        expected = model(X)
        model.merge_adapter()
        torch.testing.assert_close(model(X), expected)
        model.unmerge_adapter()
        assert torch.equal(model(X), expected)
        model.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", use_dora=True))
        model.double()
        randomize(model, "other", seed=4)
        model.set_adapter("other")
        assert not torch.equal(model(X), expected)
        assert torch.equal(model(X), fresh(model, X))
        model.set_adapter("default")
        assert torch.equal(model(X), expected)
        model.float()
        torch.testing.assert_close(model(X.float()), expected.float())


def test_under_another_adapter_that_is_merged_the_norms_are_those_of_the_base() -> None:
    model = model_of(LoraConfig(r=2, target_modules=["0"], use_dora=True))
    model.add_adapter("low", LoraConfig(r=2, target_modules=["0"]))
    model.double()
    randomize(model, "low", seed=4)
    model.set_adapter(["default", "low"])
    with torch.no_grad():
        expected = model(X)
        model.merge_adapter(["low"])
        torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_has_norms_of_its_own(way: str) -> None:
    model = model_of()
    with torch.no_grad():
        expected = model(X)
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))  # noqa: S301
        _in_place(twin)
        assert torch.equal(twin(X), fresh(twin, X))
        assert torch.equal(model(X), expected)
    assert method_in(twin) is not method_in(model)


# -- by name, in files, refused --------------------------------------------------------------------


def test_presets_and_counts() -> None:
    one, two = get_config("dora", r=8), get_config("dvora", r=16)
    assert one == LoraConfig(r=8, use_dora=True)
    assert two == VeraConfig(r=16, use_dora=True)
    for config, expected in ((one, 8 * (6 + 5) + 5 + 8 * (5 + 3) + 3), (two, 2 * 16 + 2 * (5 + 3))):
        model = get_peft_model(mlp(), config.replace(target_modules="all-linear"))
        assert model.get_nb_trainable_parameters()[0] == expected


def test_a_file_says_so_and_comes_back(tmp_path: Path) -> None:
    for method in ("dora", "dvora"):
        model = get_peft_model(mlp(), get_config(method, r=3, target_modules="all-linear"))
        randomize(model)
        model.save_pretrained(tmp_path / method)
        again = PeftModel.from_pretrained(mlp(), tmp_path / method)
        assert again.peft_config["default"] == model.peft_config["default"].replace(inference_mode=True)
        assert torch.equal(again(X.float()), model(X.float()))


def test_plain_loras_and_doras_files_are_not_mixed_up(tmp_path: Path) -> None:
    model = model_of(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(kilotune.CheckpointError, match="do not belong together"):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="use_dora: expected bool, got 'yes'"):
        LoraConfig(use_dora="yes")
    model = get_peft_model(mlp(), get_config("dvora", r=3, target_modules="all-linear"))
    with pytest.raises(UnsupportedError, match="makes no low-rank change"):
        to_lora(model)
    with pytest.raises(UnsupportedError, match="PEFT has no form for this adapter"):
        to_peft(model)


OVER = [name for name, method in METHODS.items() if issubclass(method.config_cls, LowRankConfig)]


@pytest.mark.parametrize("name", OVER)
def test_it_goes_over_every_low_rank_method(name: str) -> None:
    """Rows of W + dW at the trained length, dW from the same method without DoRA."""
    options = {**METHODS[name].example, "target_modules": ["0"]}
    x, net = torch.randn(4, 6, dtype=torch.float64), nn.Sequential(nn.Linear(6, 5)).double()
    plain, over = (
        get_peft_model(copy.deepcopy(net), get_config(name, **options, **more)) for more in ({}, {"use_dora": True})
    )
    base = over.get_base_model().get_submodule("0.base_layer")
    own = dict(over.adapter_parameters())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in plain.adapter_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
            own[key].copy_(parameter)
    weight = base.weight.detach()
    change = plain.get_base_model().get_submodule("0").slot("default").delta().weight_change(weight.double())
    moved = weight + change.detach()
    length = own["0.lora_magnitude_vector"].detach()
    right = x @ (moved * (length / moved.norm(dim=1)).unsqueeze(1)).T + base.bias.detach()
    torch.testing.assert_close(over(x), right, rtol=1e-5, atol=1e-5)
