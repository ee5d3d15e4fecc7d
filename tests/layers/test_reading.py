"""Layers that are never called but whose weight or bias code around them reads.

The reference is the plain module with weights that are changed by the formula, in float64; gradients are held against
finite differences.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilotune import (
    BitfitConfig,
    BottleneckConfig,
    Ia3Config,
    LoraConfig,
    PeftModel,
    UniLoraConfig,
    UnsupportedError,
    VeraConfig,
    get_peft_model,
)
from kilotune.layers.reading import Given, Recipe
from tests.support.models import randomize
from tests.support.readers import READERS, WIDTH, change, seeded

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X.requires_grad_()  # a reentrant checkpoint asks for it


def adapted(name: str, **options: Any) -> tuple[PeftModel, nn.Module]:
    """The reader with LoRA in its layers, and a plain one."""
    make, targets = READERS[name]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, **options)
    model = get_peft_model(seeded(make()), config)
    randomize(model.double())
    return model, seeded(make())


def loss(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().sum()


def slope(model: PeftModel, parameter: Tensor, direction: Tensor) -> float:
    """The derivative of the loss along ``direction``, by central differences."""
    step = 1e-5
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            parameter.add_(direction, alpha=sign * step)
            values.append(float(loss(model(X))))
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("name", READERS)
def test_a_parent_that_reads_weights_gets_them_with_the_adapter(name: str) -> None:
    model, plain = adapted(name)
    base = plain(X)
    wanted = change(model, copy.deepcopy(plain))(X)
    y = model.train()(X)
    assert (wanted - base).abs().max() > 1e-2
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
    loss(y).backward()
    for where, parameter in model.adapter_parameters():
        assert parameter.grad is not None, where
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=torch.Generator().manual_seed(2))
        wanted_slope = slope(model, parameter, direction)
        assert abs(wanted_slope) > 1e-4, where
        assert float((parameter.grad * direction).sum()) == pytest.approx(wanted_slope, rel=1e-6), where
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), wanted, rtol=1e-10, atol=1e-12)
        with model.disable_adapter():
            assert torch.equal(model(X), base)
        model.merge_adapter()
        torch.testing.assert_close(model(X), wanted, rtol=1e-10, atol=1e-12)
        with model.disable_adapter():
            assert torch.equal(model(X), base)
        model.unmerge_adapter()
        torch.testing.assert_close(model.merge_and_unload()(X), wanted, rtol=1e-10, atol=1e-12)


# -- what a read gives, and when -------------------------------------------------------------------


class Reader(nn.Module):
    """Runs ``read(layer)`` in its forward, and then the layer."""

    def __init__(self, read: Callable[[nn.Module], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = seeded(nn.Linear(WIDTH, WIDTH)) if layer is None else layer
        self.read = read
        self.found: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.found = self.read(self.layer)
        return self.layer(x)


def reader(read: Callable[[Any], Any], config: Any = None, layer: nn.Module | None = None) -> PeftModel:
    model = get_peft_model(Reader(read, layer), config or LoraConfig(r=2, target_modules=["layer"]))
    randomize(model)
    return model


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each value that is built."""
    built: list[str] = []
    real = Recipe.build

    def build(self: Recipe) -> Tensor:
        built.append(str(self.like))
        return real(self)

    monkeypatch.setattr(Recipe, "build", build)
    return built


def told(layer: Any) -> list[Any]:
    w = layer.weight
    said = [w.shape, w.dtype, w.device, w.ndim, w.size(), w.size(-1), w.dim(), len(w), w.numel(), w.is_cuda, w.layout]
    return [*said, w.is_floating_point(), torch.is_floating_point(w), w.element_size(), isinstance(w, Tensor), w.grad]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_a_weight_tells_of_itself_is_not_built(dropout: float, builds: list[str]) -> None:
    model = reader(told, LoraConfig(r=2, target_modules=["layer"], lora_dropout=dropout)).train()
    model(X).sum().backward()
    assert model.found == told(model.model.layer.base_layer)
    with torch.no_grad():
        model(X)
    assert not builds
    model.model.read = lambda layer: layer.weight.dtype if dropout else layer.weight + 0
    model(X)
    assert bool(builds) is not bool(dropout)


def test_outside_of_a_forward_it_is_the_parameter() -> None:
    """For ties, resizing, initialising and saving: the object itself, whatever adapters are on."""
    model = reader(lambda layer: layer.weight)
    layer = model.model.layer
    held = layer.base_layer.weight
    assert layer.weight is held
    assert layer.bias is layer.base_layer.bias
    head = nn.Linear(WIDTH, WIDTH, bias=False)
    head.weight = layer.weight
    assert head.weight is held
    nn.init.constant_(layer.weight, 0.25)
    assert (held == 0.25).all()
    layer.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.float64), requires_grad=False)
    assert layer.base_layer.weight is layer.weight is not held
    assert model.state_dict()["model.layer.base_layer.weight"].eq(1).all()

    def forward_all(values: list[float]) -> Any:  # a name is not enough
        return [*values, layer.weight]

    assert forward_all([1.0])[1] is layer.weight
    model(X)
    assert model.found is not layer.weight
    with model.disable_adapter():
        model(X)
    assert model.found is layer.weight
    model.merge_adapter()
    model(X)
    assert model.found is layer.weight


def test_where_nothing_changes_what_is_read_it_is_the_parameter() -> None:
    model = reader(lambda layer: (layer.weight, layer.bias))
    model(X)
    weight, bias = model.found
    assert bias is model.model.layer.base_layer.bias
    assert type(weight) is Given
    model = reader(lambda layer: (layer.weight, layer.bias), BitfitConfig(target_modules=["layer"]))
    model(X)
    weight, bias = model.found
    assert weight is model.model.layer.base_layer.weight
    assert type(bias) is Given
    model = reader(
        lambda layer: layer.bias, BitfitConfig(target_modules=["layer"]), seeded(nn.Linear(8, 8, bias=False))
    )
    assert model.model.layer.bias is None
    model(X)
    torch.testing.assert_close(model.found, dict(model.adapter_parameters())["layer.bitfit_delta"].double())


METHODS = {
    "vera": VeraConfig(r=3, target_modules=["layer"]),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["layer"]),
    "ia3": Ia3Config(target_modules=["layer"], feedforward_modules=[]),
    "bitfit": BitfitConfig(target_modules=["layer"]),
    "lora and its bias": LoraConfig(r=2, bias="lora_only", target_modules=["layer"]),
    "uni-lora": UniLoraConfig(r=2, theta_d_length=16, unilora_dropout=0.0, target_modules=["layer"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    """Run by its parent, a layer gives what it gives when it is called; a change of the bias alone is one too."""
    model = reader(lambda layer: F.linear(X, layer.weight, layer.bias), METHODS[method])
    y = model(X)
    torch.testing.assert_close(model.found, y, rtol=1e-6, atol=1e-6)
    parameters = [p for _, p in model.adapter_parameters()]
    wanted = torch.autograd.grad(loss(y), parameters, retain_graph=True)
    for one, two in zip(torch.autograd.grad(loss(model.found), parameters), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    model(X)
    torch.testing.assert_close(model.found, y, rtol=1e-6, atol=1e-6)


def test_several_adapters_some_of_them_merged() -> None:
    model = reader(lambda layer: F.linear(X, layer.weight, layer.bias))
    model.add_adapter("second", VeraConfig(r=3, target_modules=["layer"]))
    randomize(model)
    model.set_adapter(["default", "second"])
    y = model(X)
    torch.testing.assert_close(model.found, y, rtol=1e-6, atol=1e-6)
    model.merge_adapter(["second"])
    torch.testing.assert_close(model(X), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.found, y, rtol=1e-6, atol=1e-6)


def test_a_quantised_weight_is_read_as_floats_with_the_change() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(32, 32).requires_grad_(False)
    torchao.quantize_(holder := nn.Sequential(layer), torchao.Int8WeightOnlyConfig())
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    model = reader(lambda own: F.linear(x, own.weight, own.bias), layer=holder[0])
    y = model(x)
    torch.testing.assert_close(model.found, y, rtol=1e-4, atol=1e-4)
    base = model.model.layer.base_layer
    assert (y - base(x)).abs().max() > 1e-2
    codes = next(iter(vars(base.weight)))  # what torchao's own kernels multiply by
    model.model.read = lambda own: getattr(own.weight, codes)
    with pytest.raises(UnsupportedError, match=rf"reads \.{codes} of its quantised weight.*exclude_modules"):
        model(x)


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.__setitem__(0, 1.0),
        lambda layer: layer.weight.data.clamp_(0, 1),
        lambda layer: setattr(layer.weight, "data", torch.zeros(8, 8)),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: torch.add(layer.weight, 1, out=layer.weight),
        lambda layer: F.embedding(torch.arange(3), layer.weight, max_norm=0.01),
    ],
)
def test_a_forward_that_writes_is_refused(write: Callable[[Any], Any]) -> None:
    model = reader(write)
    before = model.model.layer.base_layer.weight.clone()
    with torch.no_grad(), pytest.raises(UnsupportedError, match="writes into the weight or bias of an adapted layer"):
        model(X)
    assert torch.equal(model.model.layer.base_layer.weight, before)


def test_a_hook_on_what_is_read_is_refused() -> None:
    model = reader(lambda layer: layer.weight.register_hook(print))
    with pytest.raises(UnsupportedError, match=r"register_hook\(\).*hang it on the adapter's parameters"):
        model(X)


def test_dropout_on_the_adapters_input_is_refused_in_training() -> None:
    model = reader(lambda layer: F.linear(X, layer.weight), LoraConfig(r=2, target_modules=["layer"], lora_dropout=0.1))
    with pytest.raises(UnsupportedError, match=r"'layer'.*computes with its weight itself.*set the dropout to 0"):
        model.train()(X)
    model.eval()(X)


def test_what_adds_to_an_output_is_refused() -> None:
    model = reader(lambda layer: F.linear(X, layer.weight), BottleneckConfig(target_modules=["layer"], width=2))
    with pytest.raises(UnsupportedError, match=r"'layer'.*no place for what bottleneck adds.*the module around it"):
        model(X)
    model.model.read = told
    model(X)


def test_rows_of_a_batch_cannot_have_a_weight_each(builds: list[str]) -> None:
    model = reader(told)
    with model.route(["default", None]):
        model(X)
        assert not builds
        model.model.read = lambda layer: layer.weight.sum()
        with pytest.raises(UnsupportedError, match=r"'layer'.*is one for all rows of a batch.*run one at a time"):
            model(X)
    with model.route([None, None]):
        model(X)
    assert torch.equal(model.found, model.model.layer.base_layer.weight.sum())


def test_rows_of_a_batch_cannot_have_a_whole_copys_weight_each() -> None:
    around = Reader(lambda layer: layer.weight.sum())
    config = LoraConfig(r=2, target_modules=["1"], modules_to_save=["layer"])
    model = get_peft_model(nn.Sequential(around, seeded(nn.Linear(WIDTH, 2))), config)
    randomize(model)
    saved: Any = around.layer
    model(X)
    assert torch.equal(around.found, saved.modules_to_save["default"].weight.sum())
    with model.route([None, None]):
        model(X)
    assert torch.equal(around.found, saved.original_module.weight.sum())
    with model.route(["default", None]), pytest.raises(UnsupportedError, match="replace whole.*'weight' itself"):
        model(X)


# -- who follows the operations --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["swin", "attention pool", "siglip2 positions", "run and read", "eva02"])
def test_it_compiles(name: str) -> None:
    model, _ = adapted(name)
    y = model(X)
    parameters = [p for _, p in model.adapter_parameters()]
    wanted = torch.autograd.grad(loss(y), parameters)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), y)
    for one, two in zip(torch.autograd.grad(loss(compiled(X)), parameters), wanted, strict=True):
        torch.testing.assert_close(one, two)


def test_compiled_code_goes_around_a_read_that_may_be_refused() -> None:
    model = reader(told, LoraConfig(r=2, target_modules=["layer"], lora_dropout=0.1)).train()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    model.model.read = lambda layer: F.linear(X, layer.weight)
    with pytest.raises(UnsupportedError, match="set the dropout to 0"):
        compiled(X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_transforms_and_tracers() -> None:
    model, _ = adapted("swin")
    x = X.detach()
    y = model(x)
    held = {name: p.detach() for name, p in model.named_parameters()}
    trained = {name: value for name, value in held.items() if "lora" in name}

    def run(some: dict[str, Tensor], rows: Tensor) -> Tensor:
        made: Tensor = torch.func.functional_call(model, {**held, **some}, (rows,))
        return made

    grads = torch.func.grad(lambda some: loss(run(some, x)))(trained)
    loss(y).backward()
    for name, parameter in model.named_parameters():
        if name in trained:
            torch.testing.assert_close(grads[name], parameter.grad)
    torch.testing.assert_close(torch.func.vmap(lambda row: run({}, row))(x.unsqueeze(1)).squeeze(1), y)
    _, tangent = torch.func.jvp(lambda rows: run({}, rows), (x,), (x,))
    assert tangent.shape == y.shape
    model.eval()
    torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), y)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)


def test_autocast_rounds_what_is_read_as_it_rounds_the_merged_weight() -> None:
    make, targets = READERS["swin"]
    model = get_peft_model(seeded(make()).float(), LoraConfig(r=2, target_modules=targets))
    randomize(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(X.float())
        model.merge_adapter()
        assert torch.equal(model(X.float()), y)


def test_a_second_derivative_through_a_function_with_its_own_backward() -> None:
    model, _ = adapted("own backward")
    (slot,) = model.installed("default").slots().values()
    a, b = slot.get_parameter("lora_A"), slot.get_parameter("lora_B")
    x = X.detach()

    def penalty(y: Tensor) -> Tensor:
        first = torch.autograd.grad(y.square().sum(), (a, b), create_graph=True)
        return sum((g.square().sum() for g in first), torch.zeros(()))

    base = model.model.head.base_layer
    wanted = torch.autograd.grad(penalty(F.linear(x, base.weight + 2.0 * b @ a, base.bias)), (a, b))
    for one, two in zip(torch.autograd.grad(penalty(model(x)), (a, b)), wanted, strict=True):
        torch.testing.assert_close(one, two)


def test_parameters_that_were_changed_before_the_backward_are_told_of() -> None:
    model, _ = adapted("own backward")
    y = model(X)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place.*call backward\(\) before optimizer.step\(\)"):
        loss(y).backward()


def test_a_pointer_is_that_of_the_built_value() -> None:
    def read(layer: Any) -> Any:
        weight = layer.weight
        size = weight.numel()
        seen = (ctypes.c_double * size).from_address(weight.data_ptr())
        return torch.tensor(list(seen), dtype=torch.float64).view(weight.shape), weight + 0

    model = reader(read)
    model(X)
    assert torch.equal(*model.found)


@pytest.mark.parametrize("rescales", [False, True])
def test_a_change_of_the_active_adapters_before_the_backward(rescales: bool) -> None:
    """The value is built in the backward there: with what was active, or not at all."""
    model, _ = adapted("own backward")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["head"], use_dora=rescales))
    model.set_adapter(["default", "second"])
    randomize(model.double())
    parameters = [p for _, p in model.adapter_parameters("default")]
    wanted = torch.autograd.grad(loss(model(X)), parameters)
    y = model(X)
    model.set_adapter("second")
    if rescales:
        with pytest.raises(UnsupportedError, match="change it after the backward"):
            loss(y).backward()
        return
    for parameter in parameters:
        parameter.requires_grad_()
    for one, two in zip(torch.autograd.grad(loss(y), parameters), wanted, strict=True):
        torch.testing.assert_close(one, two)
