"""Layers and their changes in one function, on models: each way gives the gradients of the base with W + dW in it."""

from __future__ import annotations

import collections
import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kilotune import AdapterConfig, BitfitConfig, BottleneckConfig, LoraConfig, VeraConfig, get_peft_model
from kilotune.errors import ConfigError
from kilotune.kernels import lowrank, ways
from kilotune.kernels.lowrank import Factors
from kilotune.kernels.ways import WAYS, Choice, Way
from kilotune.layers import fusion
from kilotune.model.adapter_model import AdapterModel
from tests.kernels.test_lowrank import keeping, storages
from tests.support.models import mlp, randomize, tiny_gpt2, tiny_llama, trained

NAMES = [way.value for way in Way]
each_way = pytest.mark.parametrize("way", NAMES)


class Attention(nn.Module):
    """q, k and v (12, 12 and 10 features) fed by one tensor of 8, o by another."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 10, bias=False)
        self.o = nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        y: Tensor = self.o(weights @ self.v(x))
        return y


ALL = ["q", "k", "v", "o"]


def net(config: AdapterConfig | None = None, way: str = "picked", dtype: torch.dtype = torch.float64) -> AdapterModel:
    """An attention whose adapter does something."""
    model = get_peft_model(Attention().to(dtype), config or VeraConfig(r=6, target_modules=ALL))
    model = model.double() if dtype == torch.float64 else model  # the adapters too, which are float32 otherwise
    randomize(model)
    model.set_way(way)
    return model


def leaves(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(trained(model))


def merged_weights(model: AdapterModel) -> dict[str, Tensor]:
    """The base's weights with all changes in them, with their graphs, by their names in the base."""
    found = {}
    for name, layer in model.adapted_layers().items():
        matrix, bias = layer.base_matrix(), layer.base_bias()
        total, shift = matrix, bias
        for adapter in model.active_adapters:
            slot = layer.slot(adapter)
            delta = None if slot is None else slot.delta()
            if delta is not None:
                change, own = delta.weight_change(matrix), delta.bias_change(bias)
                total = total if change is None else total + change
                shift = shift if own is None or shift is None else shift + own
            if slot is not None and slot.trained_bias is not None and bias is not None and shift is not None:
                shift = shift + (slot.trained_bias - bias)
        found[f"{name}.weight"] = layer.kind.native(layer.base_layer, total)
        if shift is not None:
            found[f"{name}.bias"] = shift
    return found


def reference(model: AdapterModel, base: nn.Module, run: Callable[[Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(output, gradients of the adapters by name) of ``base``, the model before it got adapters."""
    own = leaves(model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(base, merged_weights(model), args, kwargs)

    y = run(call)
    return y.detach(), gradients(y, own)


def gradients(y: Tensor, own: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    found = torch.autograd.grad(y.square().sum(), list(own.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(own.items(), found)}


def equals_the_reference(
    model: AdapterModel, base: nn.Module, run: Callable[[Any], Tensor], tolerance: float = 1e-9
) -> None:
    expected, right = reference(model, base, run)
    y = run(model)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    found = gradients(y, leaves(model))
    assert any(bool(g.any()) for g in right.values())
    for name, value in right.items():
        close = {"rtol": tolerance, "atol": tolerance * max(1.0, float(value.abs().max()))}
        torch.testing.assert_close(found[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Choice]]:
    """The choices with which layers run in one function with their change."""
    seen: list[Choice] = []
    real = lowrank.linear

    def spy(x: Any, weight: Any, bias: Any, a: Any, factors: Any, choice: Choice, z: Any = None) -> Tensor:
        seen.append(choice)
        return real(x, weight, bias, a, factors, choice, z)

    with monkeypatch.context() as patch:
        patch.setattr(lowrank, "linear", spy)
        yield seen


def unfused(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    """What ``run`` gives where the layer and its change run one after the other, without kernels of our own."""
    with monkeypatch.context() as patch:
        patch.setattr(fusion, "run", lambda *args: None)
        patch.setattr(lowrank, "plain", lambda: True)
        return run()


# -- models --------------------------------------------------------------------------------------------


LOW_RANK: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=6, target_modules="all-linear"),
    "vera-shape": VeraConfig(r=6, target_modules="all-linear", sharing="shape"),
    "vera-peft": VeraConfig(r=6, target_modules="all-linear", generator="peft"),
    "vera-wide": VeraConfig(r=40, target_modules="all-linear"),  # above in and out
    "vera-bias": VeraConfig(r=6, target_modules="all-linear", bias="all"),
    "vera-only": VeraConfig(r=6, target_modules="all-linear", bias="vera_only"),
    "lora": LoraConfig(r=3, target_modules="all-linear"),
    "lora-fa": LoraConfig(r=3, target_modules="all-linear", lora_fa=True),
    "lora-bias": LoraConfig(r=3, target_modules="all-linear", bias="lora_only"),
}


@each_way
@pytest.mark.parametrize("name", LOW_RANK)
def test_each_way_on_a_small_net(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Sequential(Attention(), nn.Linear(8, 3)).double()
    model = get_peft_model(copy.deepcopy(base), LOW_RANK[name]).double()
    randomize(model)
    model.set_way(way)
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    with watched(monkeypatch) as seen:
        equals_the_reference(model, base, lambda m: m(x))
    # all-linear leaves out nothing here, and one call of each layer is seen
    assert len(seen) == len(model.adapted_layers())
    assert way == "picked" or set(seen) == {WAYS[Way(way)]}


@each_way
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("name", ["vera", "lora"])
def test_each_way_on_transformers(way: str, make: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make().double().eval()
    config = LOW_RANK[name].replace(task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config).double().eval()
    randomize(model, scale=0.2)
    model.set_way(way)
    ids = torch.arange(14).reshape(2, 7) % 32
    with watched(monkeypatch) as seen:
        equals_the_reference(model, base, lambda m: m(input_ids=ids).logits, 1e-8)
    assert len(seen) == len(model.adapted_layers())


class ConvNet(nn.Module):
    """Convolutions of 1, 2 and 3 dimensions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv1d(2, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2, bias=False)
        self.three = nn.Conv3d(4, 3, (1, 2, 2))

    def forward(self, x: Tensor, last: bool = False) -> Tensor:
        y = torch.tanh(self.one(x))  # (..., 4, L)
        y = y.unsqueeze(-1) * y.unsqueeze(-2)
        if last:
            y = y.contiguous(memory_format=torch.channels_last)
        y = torch.tanh(self.grouped(torch.tanh(self.two(y))))
        z: Tensor = self.three(torch.stack([y, y * 2.0], -3))
        return z


@each_way
@pytest.mark.parametrize("name", ["vera", "lora"])
@pytest.mark.parametrize("form", ["batched", "channels_last", "unbatched"])
def test_convolutions(way: str, name: str, form: str) -> None:
    base = ConvNet().double()
    config = LOW_RANK[name].replace(target_modules=["one", "two", "grouped", "three"])
    model = get_peft_model(copy.deepcopy(base), config).double()
    randomize(model)
    model.set_way(way)
    x = torch.randn(*(() if form == "unbatched" else (2,)), 2, 6, dtype=torch.float64)
    equals_the_reference(model, base, lambda m: m(x, last=form == "channels_last"))


@each_way
@pytest.mark.parametrize("name", ["vera", "lora"])
def test_embeddings(way: str, name: str) -> None:
    base = nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.Linear(5, 4)).double()
    model = get_peft_model(copy.deepcopy(base), LOW_RANK[name].replace(target_modules=["0", "1"])).double()
    randomize(model)
    model.set_way(way)
    ids = torch.tensor([[1, 2, 2], [8, 3, 1]])
    equals_the_reference(model, base, lambda m: m(ids))


def add(model: AdapterModel, **configs: AdapterConfig) -> None:
    """More adapters, all of them on and doing something."""
    for seed, (name, config) in enumerate(configs.items()):
        model.add_adapter(name, config)
        randomize(model, name, seed=seed + 7)
    model.set_adapter(["default", *configs])
    model.double()


@each_way
def test_several_adapters_sum(way: str) -> None:
    """Two VeRA of different ranks, a LoRA, and BitFit beside them."""
    base = Attention().double()
    model = net(way=way)
    lora, vera = LoraConfig(r=2, target_modules=["q", "v"]), VeraConfig(r=3, target_modules=["k", "q", "o"])
    add(model, lora=lora, vera=vera, bits=BitfitConfig(target_modules=["q", "k"]))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    equals_the_reference(model, base, lambda m: m(x))


@each_way
@pytest.mark.parametrize("beside", ["dora", "dvora", "bottleneck"])
def test_beside_what_is_not_a_plain_low_rank_change(way: str, beside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(way=way)
    config: AdapterConfig = {
        "dora": LoraConfig(r=2, target_modules=["q", "v"], use_dora=True),
        "dvora": VeraConfig(r=2, target_modules=["q", "v"], use_dora=True),
        "bottleneck": BottleneckConfig(target_modules=["q", "o"], width=4),
    }[beside]
    add(model, other=config)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def both() -> tuple[Tensor, dict[str, Tensor]]:
        y = model(x)
        return y.detach(), gradients(y, leaves(model))

    with watched(monkeypatch) as seen:
        found = both()
    assert len(seen) == (4 if beside == "bottleneck" else 2)
    expected = unfused(monkeypatch, both)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_planted_fault_in_a_model_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base, x = Attention().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    real = lowrank._input_gradient
    monkeypatch.setattr(lowrank, "_input_gradient", lambda *args: real(*args) * 1.001)
    for way in NAMES:
        with pytest.raises(AssertionError):
            equals_the_reference(net(way=way), base, lambda m: m(torch.tanh(m(x))))


# -- dropout, checkpointing, life -----------------------------------------------------------------------


@each_way
def test_dropout_draws_once_a_layer_and_runs_factored(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(VeraConfig(r=6, target_modules=ALL, vera_dropout=0.4), way)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def step() -> tuple[Tensor, dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        y = model(x)
        state = torch.get_rng_state()
        return y.detach(), gradients(y, leaves(model)), state

    with watched(monkeypatch) as seen:
        found = step()
    assert seen == []
    torch.testing.assert_close(found, unfused(monkeypatch, step), rtol=1e-10, atol=1e-10)
    torch.manual_seed(3)
    for features in (8, 8, 8, 10):  # as the layers run
        F.dropout(torch.ones(2, 5, features, dtype=torch.float64), 0.4)
    assert torch.equal(torch.get_rng_state(), found[2])
    model.eval()
    with watched(monkeypatch) as seen:
        model(x)
    assert len(seen) == 4


@each_way
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("name", ["vera", "lora"])
def test_gradient_checkpointing(way: str, reentrant: bool, name: str) -> None:
    base = Attention().double()
    model = net(LOW_RANK[name].replace(target_modules=ALL), way).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)

    def run(m: Any) -> Tensor:
        return checkpoint(m, checkpoint(m, x, use_reentrant=reentrant), use_reentrant=reentrant)

    expected, right = reference(model, base, lambda m: m(m(x)))
    y = run(model)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    for name_, p in leaves(model).items():
        torch.testing.assert_close(p.grad, right[name_], msg=lambda m, n=name_: f"{n}: {m}")


@each_way
def test_merging_and_disabling_between_steps(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = Attention().double(), net(way=way)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = model(x)
    with watched(monkeypatch) as seen:
        model.merge_adapter()
        torch.testing.assert_close(model(x), y.detach())
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
    assert seen == []
    equals_the_reference(model, base, lambda m: m(x))
    before = gradients(model(x), leaves(model))
    y = model(x)
    model.merge_adapter()  # between forward and backward: the backward is that of the forward
    after = gradients(y, leaves(model))
    model.unmerge_adapter()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


@each_way
def test_a_step_changes_what_the_next_one_uses(way: str) -> None:
    """Three steps of an optimizer, against the reference at each."""
    base, model = Attention().double(), net(way=way)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(leaves(model).values(), lr=0.01)
    for _ in range(3):
        equals_the_reference(model, base, lambda m: m(x))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


# -- layers that are more than their product ---------------------------------------------------------------


def _forward_hook(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda module, args, y: y * 2.0)


def _pre_hook(layer: nn.Module) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def _backward_hook(layer: nn.Module) -> None:
    layer.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2.0,))


def _backward_pre_hook(layer: nn.Module) -> None:
    layer.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2.0,))


def _patched(layer: nn.Module) -> None:
    real = layer.forward
    layer.forward = lambda x: real(x) * 2.0  # type: ignore[method-assign]


CHANGED = [_forward_hook, _pre_hook, _backward_hook, _backward_pre_hook, _patched]


def is_respected(change: Callable[[nn.Module], None], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody did to the base layer is done, and the other layers run as before."""
    model = net(way=way)
    change(model.adapted_layers()["v"].base_layer)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)

    def both() -> tuple[Tensor, ...]:
        y = model(x)
        return (y.detach(), *torch.autograd.grad(y.square().sum(), [x, *leaves(model).values()]))

    with watched(monkeypatch) as seen:
        found = both()
    torch.testing.assert_close(found, unfused(monkeypatch, both), rtol=1e-10, atol=1e-10)
    assert len(seen) == 3


@each_way
@pytest.mark.parametrize("change", CHANGED)
def test_hooks_and_patches_of_the_base_layer_are_respected(
    way: str, change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_respected(change, way, monkeypatch)


@pytest.mark.parametrize("change", CHANGED)
def test_a_planted_blindness_for_hooks_is_seen(
    change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "_hooked", lambda module: False)
    with pytest.raises(AssertionError):
        is_respected(change, "merged", monkeypatch)


class Doubled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        return super().forward(input) * 2.0


class Named(nn.Linear):
    """A layer with another name."""


@each_way
def test_a_subclass_with_its_own_forward(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, fused in ((Doubled, 0), (Named, 1)):
        layer = cls(6, 5).double()
        model = get_peft_model(nn.Sequential(copy.deepcopy(layer)), VeraConfig(r=4, target_modules=["0"])).double()
        randomize(model)
        model.set_way(way)
        x = torch.randn(3, 6, dtype=torch.float64)
        with watched(monkeypatch) as seen:
            y = model(x)
        assert len(seen) == fused
        slot = model.adapted_layers()["0"].slot("default")
        assert slot is not None
        delta = slot.delta()
        assert delta is not None
        change = delta.weight_change(layer.weight)
        assert change is not None
        torch.testing.assert_close(y, layer(x) + x @ change.T)


@each_way
def test_a_weight_that_its_user_unfroze_gets_its_gradient(way: str) -> None:
    base, model = Attention().double(), net(way=way)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for layer in model.adapted_layers().values():
        for parameter in layer.base_layer.parameters():
            parameter.requires_grad_()
    assert sum(".base_layer." in name for name in leaves(model)) == 7
    equals_the_reference(model, base, lambda m: m(x))
    for name, layer in model.adapted_layers().items():
        layer.base_layer.weight.requires_grad_(name == "o")  # the biases alone, and one weight
    equals_the_reference(model, base, lambda m: m(x))


@each_way
def test_wrong_input_is_refused_in_the_words_of_the_layer(way: str) -> None:
    layer = net(way=way).adapted_layers()["q"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'what'"):
        layer(what=torch.ones(2, 8))
    with pytest.raises(TypeError, match="list"):
        layer([1.0])
    torch.testing.assert_close(layer(input=torch.ones(2, 8).double()), layer(torch.ones(2, 8).double()))
    for shape in ((8,), (0, 8), (2, 0, 8)):
        assert layer(torch.ones(shape).double()).shape == (*shape[:-1], 12)


# -- set_way ---------------------------------------------------------------------------------------------


def test_set_way_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), torch.randn(3, 8, dtype=torch.float64)
    for way in (Way.FACTORED, Way.MERGED, Way.DENSE):
        model.set_way(way.value)
        for twin in (model, copy.deepcopy(model)):
            with watched(monkeypatch) as seen:
                twin(x)
            assert set(seen) == {WAYS[way]}
    with pytest.raises(ConfigError, match=r"way: expected one of .*got 'factord'.*factored"):
        model.set_way("factord")
    with watched(monkeypatch) as seen:
        model(x)
    assert set(seen) == {WAYS[Way.DENSE]}, "a refused name changed the way"


@each_way
def test_copies_and_saved_models_run_as_before(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(way=way), torch.randn(2, 5, 8, dtype=torch.float64)
    y = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), y)
    randomize(twin, seed=11)
    assert not torch.equal(twin(x), y)
    assert torch.equal(model(x), y)
    file = io.BytesIO()
    plain = get_peft_model(mlp().double(), VeraConfig(r=4, target_modules=["0", "2"])).double()
    randomize(plain)
    plain.set_way(way)
    torch.save(plain, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(3, 6, dtype=torch.float64)
    with watched(monkeypatch) as seen:
        assert torch.equal(again(x), plain(x))
    assert seen[:2] == seen[2:]


def test_the_pick_sees_what_the_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that reach the cost model: tokens, sharers, and what gradients there will be."""
    seen: list[ways.Shape] = []

    def spy(shape: ways.Shape) -> Choice:
        seen.append(shape)
        return ways.pick(shape)

    monkeypatch.setattr(fusion, "_picked", spy)
    model, x = net(), torch.randn(2, 5, 8, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        model(x)
    mean = (12 + 12 + 10) / 3
    shared = [ways.Shape(10, 8, out, 6, 3, mean, input=False) for out in (12, 12, 10)]
    step = [*shared, ways.Shape(10, 10, 8, 6)]
    assert seen == [*step, *(shape._replace(vectors=False, input=False) for shape in step)]
    seen.clear()
    net(LoraConfig(r=2, target_modules=["o"]))(x)
    assert seen == [ways.Shape(10, 10, 8, 2, input=False, trained_a=True)]


# -- 16 bits and autocast ----------------------------------------------------------------------------------


def swallows_nothing(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> set[Choice]:
    """The forms that run for a small and for a large change; none but factored for the small one."""
    x = torch.randn(2, 40, 8).to(dtype)
    for size, sets in ((1e-4, 1), (0.0, 1)):
        model = get_peft_model(Attention().to(dtype), VeraConfig(r=6, target_modules=ALL))
        with torch.no_grad():
            for name, p in leaves(model).items():
                p.fill_(size if name.endswith("_b") else 0.1)
        model.set_way(way)
        with watched(monkeypatch) as seen:
            model(x).sum().backward()
        assert set(seen) == {WAYS[Way.FACTORED]}, f"a merged form took a change of {size}"
        assert len(set(seen)) == sets
    model = net(way=way, dtype=dtype)
    randomize(model, scale=30.0)
    with watched(monkeypatch) as seen:
        model(x)
    return set(seen)


@pytest.mark.parametrize("dtype", lowrank.NARROW, ids=str)
@each_way
def test_no_merged_form_swallows_a_change_in_16_bits(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = swallows_nothing(way, dtype, monkeypatch)
    assert found == {WAYS[Way.FACTORED if way == "picked" else Way(way)]}


def test_a_planted_merged_form_that_swallows_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "LOST", 2.0)
    for way in ("merged", "dense"):
        with pytest.raises(AssertionError, match="a merged form took a change"):
            swallows_nothing(way, torch.bfloat16, monkeypatch)


@each_way
@pytest.mark.parametrize("name", ["vera", "lora"])
def test_autocast_runs_factored_in_16_bits(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 model under autocast: as torch's own operations do it, in the forward and outside it."""
    model = net(LOW_RANK[name].replace(target_modules=ALL), way, torch.float32)
    exact = copy.deepcopy(model).double()
    x = torch.randn(2, 30, 8)

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return y.detach(), gradients(y, leaves(model))

    with watched(monkeypatch) as seen:
        y, found = step()
    assert seen == []
    assert y.dtype == torch.bfloat16
    expected, theirs = unfused(monkeypatch, step)
    right_y = exact(x.double())
    right = gradients(right_y, leaves(exact))

    def error(one: Tensor, two: Tensor) -> float:
        return float(((one.double() - two).norm() / two.norm()).detach())

    assert error(y, right_y) < 1.3 * error(expected, right_y) + 1e-3
    assert error(y, right_y) < 0.05
    # Errors of the base's own products, which run in 16 bits, are most of it.
    ours, plain = (sum(error(part[n], right[n]) for n in right) / len(right) for part in (found, theirs))
    assert ours < 1.3 * plain + 1e-3


class Watch(TorchDispatchMode):
    """Counts products by dtype, and lets nothing wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.products: collections.Counter[torch.dtype] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket
        assert name is not torch.ops.aten._local_scalar_dense, "the host waits for the device"
        if name in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.products[args[-1].dtype] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["vera", "lora", "vera-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_picked_way_waits_for_nothing(name: str, dtype: torch.dtype) -> None:
    model = net(LOW_RANK[name].replace(target_modules=ALL), dtype=dtype)
    with Watch() as watch:
        model(torch.randn(2, 30, 8).to(dtype)).sum().backward()
    assert watch.products[dtype] > 0
    if dtype == torch.bfloat16:  # float32: M of each layer, on a CPU, and for LoRA the sum of a's gradient too
        assert watch.products[torch.float32] == (8 if name == "lora" else 4)


def test_a_planted_wait_is_seen() -> None:
    """The rounding error of a merged form in 16 bits is read by the host; only a way asked for by name does that."""
    model = net(way="merged", dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="waits"), Watch():
        model(torch.randn(2, 30, 8).to(torch.bfloat16))


# -- what is kept ----------------------------------------------------------------------------------------


class Three(nn.Module):
    """q, k and v, summed: nothing but these keeps anything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.q(x) + self.k(x) + self.v(x)
        return y


def fresh(model: AdapterModel, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of what is kept beside the model's own tensors and ``x``, one for each piece of memory."""
    own = storages([*model.parameters(), x])
    for layer in model.adapted_layers().values():
        delta = layer.adapters["default"].delta()
        own |= storages([delta.a, delta.b])
    with keeping() as kept:
        model(x)
    return sorted({k.untyped_storage().data_ptr(): tuple(k.shape) for k in kept if storages([k]) - own}.values())


def test_layers_with_one_input_keep_one_z() -> None:
    x = torch.randn(64, 32, requires_grad=True)
    vera, lora = (
        get_peft_model(Three(), c.replace(target_modules=["q", "k", "v"])) for c in (LOW_RANK["vera"], LOW_RANK["lora"])
    )
    for way in ("factored", "merged", "dense"):
        vera.set_way(way)
        lora.set_way(way)
        assert fresh(vera, x) == ([] if way == "dense" else [(64, 6)])
        assert fresh(lora, x) == ([] if way == "dense" else [(64, 3)] * 3)


# -- transforms ------------------------------------------------------------------------------------------


@each_way
def test_torch_func(way: str) -> None:
    base, model = Attention().double(), net(way=way)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    own = {name: p.detach() for name, p in leaves(model).items()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).square().sum()

    _, right = reference(model, base, lambda m: m(x))
    found = torch.func.grad(loss)(own, x)
    for name, value in right.items():
        torch.testing.assert_close(found[name], value)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(own, x)  # a gradient for each example
    for name, value in right.items():
        torch.testing.assert_close(each[name].sum(0), value)
    several = {name: torch.stack([p, p * 2.0]) for name, p in own.items()}
    ensemble = torch.func.vmap(loss, (0, None))(several, x)
    torch.testing.assert_close(ensemble[0], loss(own, x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
@each_way
def test_forward_mode(way: str) -> None:
    model = net(way=way)
    x, d = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, d))).tangent
    h = 1e-6
    expected = (model(x + h * d) - model(x - h * d)) / (2 * h)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@each_way
def test_inference_mode_and_no_grad(way: str) -> None:
    model, x = net(way=way), torch.randn(2, 5, 8, dtype=torch.float64)
    y = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
    with torch.inference_mode():
        torch.testing.assert_close(model(x).clone(), y)
    equals_the_reference(model, Attention().double(), lambda m: m(x))  # nothing of it is left


@pytest.mark.heavy
@each_way
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_traced_and_exported_models_serve_any_number_of_tokens(way: str) -> None:
    model, x = net(way=way).eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    more = torch.randn(50, 3, 8, dtype=torch.float64)  # from which on another form would be picked
    sizes = (({0: torch.export.Dim.AUTO},),)
    exported = [torch.export.export(model, (x,), dynamic_shapes=sizes, strict=s).module() for s in (False, True)]
    for call in (torch.jit.trace(model, (x,)), *exported):
        for value in (x, more):
            torch.testing.assert_close(call(value), model(value))


# -- torch.compile ---------------------------------------------------------------------------------------


def compiled_equals_eager(model: AdapterModel, backend: str, dynamic: bool | None, lengths: tuple[int, ...]) -> None:
    """Output and gradients, without a graph break, and compiled once for all steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    optimizer = torch.optim.SGD(leaves(model).values(), lr=0.01)
    for n in lengths:
        x = torch.randn(n, 5, 8, dtype=torch.float64, requires_grad=True)
        wanted = [x, *leaves(model).values()]
        y = model(x)
        expected = (y.detach(), *torch.autograd.grad(y.square().sum(), wanted))
        y = run(x)
        found = (y.detach(), *torch.autograd.grad(y.square().sum(), wanted))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for parameter, g in zip(leaves(model).values(), found[2:]):
            parameter.grad = g
        optimizer.step()  # the values change, and nothing is compiled for that
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.heavy
@pytest.mark.parametrize("way,name", [("picked", "vera"), ("factored", "lora"), ("merged", "vera"), ("dense", "lora")])
def test_compiled(way: str, name: str) -> None:
    model = net(LOW_RANK[name].replace(target_modules=ALL), way).double()
    compiled_equals_eager(model, "aot_eager", False, (3, 3))


def test_compiled_for_any_length() -> None:
    """The cost model follows a number of tokens that is a symbol."""
    model = get_peft_model(nn.Sequential(nn.Linear(8, 12)).double(), VeraConfig(r=6, target_modules=["0"])).double()
    randomize(model)
    compiled_equals_eager(model, "aot_eager", True, (50, 40, 41))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
@each_way
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ["vera", "lora"])
def test_compiled_by_inductor(way: str, dynamic: bool, name: str) -> None:
    model = net(LOW_RANK[name].replace(target_modules=ALL), way).double()
    compiled_equals_eager(model, "inductor", dynamic, (50, 40, 60) if dynamic else (3, 3, 3))


@pytest.mark.full
def test_a_length_at_which_another_form_is_picked_compiles_again() -> None:
    """Once for each form, and not for each length."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = net()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (3, 4, 400, 401, 7, 402):
        x = torch.randn(n, 5, 8, dtype=torch.float64)
        torch.testing.assert_close(run(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def kept_by_a_compiled(model: AdapterModel, x: Tensor) -> list[tuple[int, ...]]:
    """The shapes of what a compiled forward hands to its backward, but for its own inputs."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    found: list[tuple[int, ...]] = []

    def forward(graph: torch.fx.GraphModule, _: Any) -> Any:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        for node in list(output.args[0])[1:]:  # the first is the model's own
            if isinstance(node, torch.fx.Node) and node.op != "placeholder":
                found.append(tuple(node.meta["val"].shape))
        return make_boxed_func(graph.forward)

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition)
    torch.compile(model, backend=backend, fullgraph=True)(x).sum().backward()
    return found


def keeps_no_weight(way: str, name: str) -> None:
    model = get_peft_model(Three(), LOW_RANK[name].replace(target_modules=["q", "k", "v"]))
    randomize(model)
    model.set_way(way)
    kept = kept_by_a_compiled(model, torch.randn(64, 32, requires_grad=True))
    assert not [shape for shape in kept if sorted(shape) == [32, 48]], f"W' is kept: {kept}"
    assert not [shape for shape in kept if sorted(shape) == [48, 64]], f"an output is kept: {kept}"


@pytest.mark.heavy
@pytest.mark.parametrize("way,name", [("merged", "vera"), ("dense", "vera"), ("merged", "lora")])
def test_a_compiler_keeps_no_merged_weight(way: str, name: str) -> None:
    keeps_no_weight(way, name)


def test_a_planted_merged_weight_that_a_compiler_keeps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(self: Factors, weight: Tensor, a: Tensor, again: bool = False) -> Tensor:
        return torch.addmm(weight, self.folded(weight.dtype), a)

    monkeypatch.setattr(Factors, "merged", planted)
    with pytest.raises(AssertionError, match="W' is kept"):
        keeps_no_weight("merged", "vera")
