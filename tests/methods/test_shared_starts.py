"""The starts from the base are held once for all the adapters of a model, and an adapter has its A and B alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kilotune import ConfigError, LoraConfig, PeftModel, get_peft_model
from kilotune.methods import _svd
from kilotune.model.routed_model import _alike
from tests.support.models import mlp

X = torch.linspace(-1, 1, 24).view(4, 6)
STARTS = ("pissa", "pissa_niter_3", "olora")


def config(start: str = "pissa", **options: Any) -> LoraConfig:
    usual: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}
    return LoraConfig(init_lora_weights=start, **{**usual, **options})


def moved(model: PeftModel, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters(name):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def with_adapters(start: str, count: int, **options: Any) -> PeftModel:
    model = get_peft_model(mlp(), config(start, **options), "a0")
    for index in range(1, count):
        model.add_adapter(f"a{index}", config(start, **options))
    for index in range(count):
        moved(model, f"a{index}", index)
    return model


def change(model: PeftModel, layer: str, name: str, weight: torch.Tensor, start: str) -> torch.Tensor:
    """What an adapter is to add to a layer's weight, in float64 by the papers' formulas."""
    slot = model.adapted_layers()[layer].slot(name)
    assert slot is not None
    own, w, scale = {key: value.detach().double() for key, value in slot.own().items()}, weight.double(), 3.0
    if start == "olora":
        q = torch.linalg.qr(w).Q[:, :2]
        part = scale * q @ q.T @ w
    else:
        u, s, vh = torch.linalg.svd(w)
        part = u[:, :2] @ torch.diag(s[:2]) @ vh[:2]
    return scale * own["lora_B"] @ own["lora_A"] - part


@pytest.mark.parametrize("start", STARTS)
def test_twenty_adapters_hold_the_start_once(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = _svd.WeightSource.made

    def counting(source: _svd.WeightSource, matrix: torch.Tensor) -> _svd.WeightSource:
        made.append(source.weight)
        return real(source, matrix)

    monkeypatch.setattr(_svd.WeightSource, "made", counting)
    model = with_adapters(start, 20)
    layers = model.adapted_layers()
    sizes = [(layer.base_layer.weight.shape[0] + layer.base_layer.weight.shape[1]) * 2 for layer in layers.values()]
    assert sum(tensor.numel() for tensor in model.projections.tensors()) == sum(sizes)
    assert len(made) == len(layers)  # nothing is computed twice either
    for name in (f"a{index}" for index in range(20)):
        slots = [layer.slot(name) for layer in layers.values()]
        assert [sorted(slot.own()) for slot in slots if slot is not None] == [["lora_A", "lora_B"]] * len(layers)
    assert not [key for key in model.state_dict() if "start" in key]


def test_other_scales_share_a_start_and_other_ranks_do_not() -> None:
    model = get_peft_model(mlp(), config(), "a")
    before = mlp()(X)
    model.add_adapter("b", config(lora_alpha=1, use_rslora=True))
    assert len(model.projections.extents()) == 2
    model.add_adapter("c", config(r=1))
    assert len(model.projections.extents()) == 4
    for name in "abc":
        model.set_adapter(name)
        assert torch.equal(model(X), before)


@pytest.mark.parametrize("start", STARTS)
def test_each_of_several_changes_the_weight_by_the_formula(start: str) -> None:
    model, bare = with_adapters(start, 3), mlp()
    for name in ("a0", "a1", "a2"):
        model.set_adapter(name)
        twin = copy.deepcopy(bare).double()
        with torch.no_grad():
            for at, module in enumerate(twin):
                if isinstance(module, nn.Linear):
                    module.weight.add_(change(model, str(at), name, bare[at].weight, start))
        torch.testing.assert_close(model(X).double(), twin(X.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_rows_of_several_in_one_pass_are_each_alone(start: str) -> None:
    model = with_adapters(start, 3)
    model.add_adapter("d", config(start, use_dora=True))  # beside one that runs by itself
    moved(model, "d", 9)
    names = ["a0", "a1", "a2", "d"]
    alone = []
    for index, name in enumerate(names):
        model.set_adapter(name)
        alone.append(model(X[index : index + 1]).detach())
    assert _alike({name: model.installed(name) for name in names}) == [["a0", "a1", "a2"], ["d"]]
    with model.route(names):
        together = model(X)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def copied(model: PeftModel) -> PeftModel:
    return copy.deepcopy(model)


def pickled(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("twin_of", [copied, pickled])
def test_copies_are_the_same(start: str, twin_of: Callable[[PeftModel], PeftModel]) -> None:
    model = with_adapters(start, 2)
    expected = model(X).detach()
    twin = twin_of(model)
    assert torch.equal(twin(X), expected)
    moved(twin, "a0", 7)
    assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("start", STARTS)
def test_a_model_turned_to_another_dtype(start: str) -> None:
    """The start is taken as A and B are held, so an adapter that has learnt nothing changes nothing there either."""
    for dtype in (torch.bfloat16, torch.float64):
        model = get_peft_model(mlp(), config(start)).to(dtype)
        assert torch.equal(model(X.to(dtype)), mlp().to(dtype)(X.to(dtype)))
    model = with_adapters(start, 2)
    model.set_adapter("a0")
    expected = model(X).detach()
    torch.testing.assert_close(model.to(torch.float64)(X.double()).float(), expected, rtol=1e-5, atol=1e-5)


def test_what_nobody_needs_is_freed() -> None:
    model = with_adapters("pissa", 2)
    model.set_adapter("a1")
    expected = model(X).detach()
    model.delete_adapter("a0")
    assert torch.equal(model(X), expected)
    assert model.projections.tensors()
    bare = model.unload()
    assert model.projections.tensors() == []
    assert torch.equal(bare(X), mlp()(X))


def test_a_changed_weight_gives_another_start() -> None:
    """And who was there before keeps the start that it was trained from."""
    model = with_adapters("pissa", 1)
    old = {name: layer.base_layer.weight.detach().clone() for name, layer in model.adapted_layers().items()}
    with torch.no_grad():
        for layer in model.adapted_layers().values():
            layer.base_layer.weight.copy_(layer.base_layer.weight.flip(1) * 1.5)
    model.add_adapter("new", config())
    assert len(model.projections.extents()) == 2 * len(old)
    model.set_adapter("new")
    with model.disable_adapter():
        bare = model(X)
    assert torch.equal(model(X), bare)
    moved(model, "new", 4)
    for name, layer in model.adapted_layers().items():
        for adapter, weight in (("a0", old[name]), ("new", layer.base_layer.weight.detach())):
            slot = layer.slot(adapter)
            assert slot is not None
            got = slot.delta().weight_change(weight)  # type: ignore[union-attr]
            expected = change(model, name, adapter, weight, "pissa").float()
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    alone = []
    for index, adapter in enumerate(("a0", "new")):
        model.set_adapter(adapter)
        alone.append(model(X[index : index + 1]).detach())
    assert _alike({name: model.installed(name) for name in ("a0", "new")}) == [["a0"], ["new"]]  # of other starts
    with model.route(["a0", "new"]):
        torch.testing.assert_close(model(X[:2]), torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", STARTS)
def test_without_weights_there_is_no_start(start: str, tmp_path: Path) -> None:
    with_adapters(start, 1).save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = mlp()
    model = get_peft_model(empty, config(start))
    assert all(parameter.is_meta for _, parameter in model.adapter_parameters())
    model.to_empty(device="cpu")
    with pytest.raises(ConfigError, match="so its factors were never made; load the base's weights first"):
        model(X)


def test_experts_have_a_start_each() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(x, self.weight)

    net = nn.Sequential(Experts())
    before = net[0].weight.detach().clone()
    x = X[:3].unsqueeze(1)
    model = get_peft_model(net, config(target_modules=[], target_parameters=["0.weight"]))
    assert torch.equal(model(x), torch.bmm(x, before))
    assert len(model.projections.extents()) == 3
