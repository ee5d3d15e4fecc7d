"""Quantised layers and their change in one function: right, dequantised once each way, and nothing dense is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.config import AdapterConfig
from kilotune.kernels.lowrank import Factors
from kilotune.kernels.ways import Way
from kilotune.layers import fusion
from kilotune.storage import bnb8, storage_of
from kilotune.storage.torchao import _TorchAO
from tests.conformance.quantised import INN, OUT, STORAGE_SCHEMES, StorageCase, _named, weight_of
from tests.support.models import randomize

WAYS = [way.value for way in Way]
VERA, LORA = VeraConfig(r=8, target_modules=["layer"]), LoraConfig(r=4, target_modules=["layer"])
IDS = [f"{case.storage}-{case.name}" for case in STORAGE_SCHEMES]
SCHEMES = dict(zip(IDS, STORAGE_SCHEMES, strict=True))
READ = [name for name in IDS if not name.startswith("bnb-int8")]  # bitsandbytes multiplies by int8 codes itself
ROWS = 40
REQUANTISED = pytest.mark.filterwarnings("ignore:re-quantising moved")  # as merging into so few bits does


def dtype_of(case: StorageCase) -> torch.dtype:
    return torch.bfloat16 if case.name.endswith("bf16") else torch.float32


def made(case: StorageCase, way: str = "picked", config: AdapterConfig = VERA, bias: bool = True) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(_named(case.quantise(nn.Linear(INN, OUT, bias=bias))), config)
    randomize(model)
    model.set_way(way)
    return model


def batch(case: StorageCase, grad: bool = True) -> Tensor:
    x = torch.randn(2, ROWS // 2, INN, generator=torch.Generator().manual_seed(4)).to(dtype_of(case))
    return x.requires_grad_(grad)


def gradients(model: PeftModel, x: Tensor, y: Tensor) -> list[Tensor]:
    """Of x and of all trained parameters, for a loss that is not the same for all outputs."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), [x, *(p for _, p in model.adapter_parameters())]))


# -- against float64 ---------------------------------------------------------------------------------------------------


def agrees_with_float64(name: str, way: str, config: AdapterConfig) -> None:
    """Outputs and gradients are those of the composed form on the dequantised weight."""
    case = SCHEMES[name]
    model, x = made(case, way, config), batch(case)
    y = model(x)
    found = gradients(model, x, y)
    layer = model.adapted_layers()["layer"]
    weight, bias = weight_of(layer.base_layer).double(), layer.base_bias()
    assert bias is not None
    slot = layer.slot("default")
    own = {key: p.detach().double().requires_grad_() for key, p in slot.own().items()}
    delta = slot.method.delta(slot.site, own, slot.shared)
    wide = x.detach().double().requires_grad_()
    scaled = (wide @ delta.a.double().T) * (1.0 if delta.mid is None else delta.mid) * delta.scale
    change = scaled @ delta.b.double().T * (1.0 if delta.out is None else delta.out)
    expected = wide @ weight.T + bias.detach().double() + change
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).double()
    names = [key.rpartition(".")[2] for key, _ in model.adapter_parameters()]
    wanted = torch.autograd.grad((expected * weights).sum(), [wide, *(own[key] for key in names)])
    bound = 2e-2 if dtype_of(case) == torch.bfloat16 else 2e-5
    for got, exact in zip([y.detach(), *found], [expected.detach(), *wanted], strict=True):
        assert float((got.double() - exact).norm() / exact.norm()) < bound, "not what float64 gives"


@pytest.mark.parametrize("config", [VERA, LORA], ids=["vera", "lora"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", IDS)
def test_agrees_with_float64(name: str, way: str, config: AdapterConfig) -> None:
    agrees_with_float64(name, way, config)


# -- how often the weight is read --------------------------------------------------------------------------------------


@contextmanager
def counted(model: PeftModel) -> Iterator[Callable[[], int]]:
    """How often the weight was made of its codes since the last time one asked, by us or by bitsandbytes' layer."""
    count = [0]

    def counting(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return plain(*args, **kwargs)

        return run

    def since() -> int:
        found, count[0] = count[0], 0
        return found

    storage = storage_of(model.layer.base_layer)
    with pytest.MonkeyPatch.context() as patch:
        if storage.name == "bnb-4bit":
            import bitsandbytes.functional

            plain = bitsandbytes.functional.dequantize_4bit
            patch.setattr(bitsandbytes.functional, "dequantize_4bit", counting(plain))
        else:
            patch.setattr(type(storage), "read", counting(type(storage).read))
        yield since


def read_once_each_way(name: str, how: str, way: str = "picked") -> None:
    """Once in each forward, and once in the backward; a checkpoint's second forward is a forward."""
    case = SCHEMES[name]
    model, x = made(case, way), batch(case)
    with counted(model) as since:
        y = model(x) if how == "plain" else checkpoint(model, x, use_reentrant=how == "reentrant")
        forward = since()
        y.square().sum().backward()
        backward = since()
    # A reentrant checkpoint's first forward wants no gradient, so a vendor's layer runs as it is there.
    first = 0 if how == "reentrant" and not name.startswith("bnb-4bit") else 1
    assert (forward, backward) == (first, 1 if how == "plain" else 2), "read too often"


@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("name", READ)
def test_read_once_each_way(name: str, how: str) -> None:
    read_once_each_way(name, how)


@pytest.mark.parametrize("way", WAYS)
def test_read_once_in_each_way_that_is_asked_for(way: str) -> None:
    for name in ("bnb-4bit-nf4-double", "torchao-int8"):
        read_once_each_way(name, "plain", way)


def test_not_read_for_a_gradient_that_nobody_wants() -> None:
    case = SCHEMES["bnb-4bit-nf4-double"]
    model, x = made(case), batch(case, grad=False)
    with counted(model) as since:
        y = model(x)
        assert since() == 1
        y.sum().backward()
        assert since() == 0
        with torch.no_grad():
            model(x)
        assert since() == 1


def nothing_dense_is_kept(name: str, way: str) -> None:
    case = SCHEMES[name]
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    model, x = made(case, way), batch(case)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    shapes = {tuple(t.shape) for t in kept if t.is_floating_point()}
    assert shapes, "nothing is kept, so this tests nothing"
    assert not shapes & {(OUT, INN), (INN, OUT)}, "the weight's floats are kept"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", READ)
def test_nothing_dense_is_kept(name: str, way: str) -> None:
    nothing_dense_is_kept(name, way)


# -- the weight changes between forward and backward -------------------------------------------------------------------


def backward_uses_the_forwards_weight(name: str, way: str) -> None:
    """Merging, and going back, between forward and backward changes no gradient."""
    case = SCHEMES[name]
    results = []
    for between in (lambda model: None, lambda model: model.merge_adapter(), _there_and_back, _merged_and_run):
        model, x = made(case, way), batch(case)
        y = model(x)
        before = weight_of(model.layer.base_layer)
        between(model)
        if model.layer.merged:
            assert not torch.equal(weight_of(model.layer.base_layer), before), "merging changed nothing"
        results.append(gradients(model, x, y))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert torch.equal(got, wanted), "the backward ran with another weight"


def _merged_and_run(model: PeftModel) -> None:
    model.merge_adapter()
    model(torch.ones(2, INN, dtype=model.layer.compute_dtype(), requires_grad=True))


def _there_and_back(model: PeftModel) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


@REQUANTISED
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", IDS)
def test_backward_uses_the_forwards_weight(name: str, way: str) -> None:
    backward_uses_the_forwards_weight(name, way)


@REQUANTISED
def test_merged_layers_run_as_they_are() -> None:
    """Merged adapters are in the codes; one that is not runs beside them and sees the weight of now."""
    for name in ("bnb-4bit-nf4", "bnb-int8-int8", "torchao-int8"):
        case = SCHEMES[name]
        model = made(case)
        model.add_adapter("more", VERA)
        randomize(model, "more", seed=5)
        model.set_adapter(["default", "more"])
        model.merge_adapter(["default"])
        x = batch(case)
        layer = model.adapted_layers()["layer"]
        delta = layer.slot("more").delta()
        found = model(x).detach()
        weight = weight_of(layer.base_layer)
        change = delta.weight_change(weight)
        wanted = nn.functional.linear(x, weight + change, layer.base_bias()).detach()
        assert float((found - wanted).norm() / wanted.norm()) < 2e-5


@pytest.mark.parametrize("name", ["torchao-int8", "torchao-int4", "torchao-dynamic-int8"])
def test_the_vendors_kernel_runs_where_no_gradient_is_wanted(name: str) -> None:
    case = SCHEMES[name]
    model = made(case).eval()
    with counted(model) as since, torch.no_grad():
        model(batch(case, grad=False))
        assert since() == 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["bnb-4bit-nf4-double", "torchao-int8", "torchao-int4-zeros", "torchao-dynamic-int8"])
def test_compiled(name: str) -> None:
    case = SCHEMES[name]
    model, x = made(case), batch(case)
    y = model(x)
    wanted = gradients(model, x, y)
    torch._dynamo.reset()
    again = torch.compile(model, backend="aot_eager")(x)
    found = gradients(model, x, again)
    for got, exact in zip([again.detach(), *found], [y.detach(), *wanted], strict=True):
        assert float((got - exact).norm() / exact.norm()) < 1e-5


# -- each check fails on a fault ---------------------------------------------------------------------------------------


@REQUANTISED
def test_planted_the_weight_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def now(kind: Any, storage: Any, module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        return lambda: kind.canonical(module, storage.read(module))

    monkeypatch.setattr(fusion, "_weight", now)
    for name in ("bnb-4bit-nf4", "torchao-int8"):
        with pytest.raises(AssertionError, match="ran with another weight"):
            backward_uses_the_forwards_weight(name, "factored")


@REQUANTISED
def test_planted_codes_of_now_in_bitsandbytes_own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb8.copy, "copy", lambda state: state)
    with pytest.raises(Exception, match="ran with another weight|State must contain CB"):
        backward_uses_the_forwards_weight("bnb-int8-int8", "factored")


def test_planted_a_weight_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fusion._weight

    def kept(kind: Any, storage: Any, module: nn.Module, x: Tensor) -> Any:
        read = plain(kind, storage, module, x)
        return read() if callable(read) else read

    monkeypatch.setattr(fusion, "_weight", kept)
    for way in ("factored", "merged"):
        with pytest.raises(AssertionError, match="floats are kept"):
            nothing_dense_is_kept("bnb-4bit-nf4", way)


def test_planted_the_vendors_forward_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_TorchAO, "multiplies_read", lambda self, module, differentiated: False)
    with pytest.raises(AssertionError, match="floats are kept"):
        nothing_dense_is_kept("torchao-int8", "picked")


def test_planted_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fusion._weight

    def twice(kind: Any, storage: Any, module: nn.Module, x: Tensor) -> Any:
        read = plain(kind, storage, module, x)
        return lambda: (read(), read())[0]

    monkeypatch.setattr(fusion, "_weight", twice)
    for how in ("plain", "not reentrant"):
        with pytest.raises(AssertionError, match="read too often"):
            read_once_each_way("bnb-4bit-nf4-double", how)


def test_planted_a_scale_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Factors.folded
    monkeypatch.setattr(Factors, "folded", lambda self, dtype: plain(self._replace(scale=self.scale * 1.001), dtype))
    with pytest.raises(AssertionError, match="not what float64 gives"):
        agrees_with_float64("bnb-4bit-nf4", "merged", VERA)
