"""Each cell's forward and gradients against dense arithmetic written separately."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kilotune import get_peft_model
from kilotune.deltas import LowRank, Residual
from tests.conformance.cells import CELLS, METHOD_CASES, Cell
from tests.conformance.checks import (
    EPSILON,
    adapted,
    bound,
    count,
    data,
    dense,
    forms,
    layer_of,
    layers_of,
)
from tests.conformance.declared import every_cell
from tests.support.models import trained

ONE_INPUT = [cell for cell in CELLS if cell.kind_case.keyword]
FLOAT_INPUT = [cell for cell in CELLS if not cell.kind_case.ids]


@every_cell("forward", cost=3)
def test_forward_is_the_dense_layer(cell: Cell) -> None:
    model, base = adapted(cell), cell.base(torch.float64)
    ran = 0
    for form, x in forms(cell, torch.float64).items():
        try:
            shape = base(x).shape
        except (
            RuntimeError,
            ValueError,
            AssertionError,
        ):  # transformers' Conv1D takes no strided and no empty 3-D input, ...
            with pytest.raises((RuntimeError, ValueError, AssertionError)):
                model(x)
            continue
        ran += 1
        y = model(x)
        assert y.shape == shape, form
        if y.numel():
            torch.testing.assert_close(
                y, dense(cell, model, x), rtol=0, atol=10 * EPSILON[torch.float64], msg=lambda m, f=form: f"{f}: {m}"
            )
    assert ran >= cell.kind_case.forms


@every_cell("keyword", ONE_INPUT)
def test_the_input_may_come_by_keyword(cell: Cell) -> None:
    model = adapted(cell)
    x = data(cell, 4, dtype=torch.float64)
    layer = layer_of(model)
    assert torch.equal(layer(**{cell.kind_case.keyword: x}), layer(x))


@every_cell("gradients", cost=10)
def test_gradients_are_those_of_finite_differences(cell: Cell) -> None:
    model = adapted(cell)
    exact = [name for name, _ in trained(model) if any(fnmatch.fnmatch(name, p) for p in cell.case.exact_gradient)]
    values = [p.detach().clone().requires_grad_() for name, p in trained(model) if name in exact]
    assert exact
    x = data(cell, 2, 3, dtype=torch.float64) if cell.kind_case.deep else data(cell, 2, dtype=torch.float64)

    def run(*params: Tensor) -> Any:
        return functional_call(model, dict(zip(exact, params)), (x,))

    def run_input(x: Tensor) -> Any:
        return model(x)

    assert torch.autograd.gradcheck(run, values)
    if not cell.kind_case.ids:
        assert torch.autograd.gradcheck(run_input, (x.requires_grad_(),))


@every_cell("input gradient", FLOAT_INPUT)
def test_the_gradient_reaches_the_input(cell: Cell) -> None:
    """Through the base layer and through the adapter: along some directions, that of the plain formula."""
    model = adapted(cell)
    x = data(cell, 3, dtype=torch.float64).requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights).sum().backward()
    assert x.grad is not None
    step = 1e-6
    for seed in range(4):
        moved = step * data(cell, 3, dtype=torch.float64, seed=20 + seed)
        change = dense(cell, model, x.detach() + moved) - dense(cell, model, x.detach() - moved)
        expected = (change * weights).sum() / 2
        torch.testing.assert_close((x.grad * moved).sum(), expected, rtol=1e-6, atol=1e-7 * step)


@every_cell("start")
def test_the_start_is_the_base(cell: Cell) -> None:
    model, base = cell.model(), cell.base()
    x = data(cell, 4)
    y, expected = model(x), base(x)
    assert torch.equal(y, expected) or cell.case.start != "exact" or cell.part.substitutes
    if cell.case.start == "moved":
        assert not torch.equal(y, expected)
    else:
        assert torch.allclose(y, expected, atol=1e-6)


@every_cell("init")
def test_the_start_values_are_finite_float32_and_repeatable(cell: Cell) -> None:
    values = dict(cell.model().adapter_parameters())
    again = dict(cell.model().adapter_parameters())
    assert set(values) == set(again)
    for name, value in values.items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        assert torch.equal(value, again[name])


@every_cell("acts", training=[True, False])
def test_a_trained_adapter_changes_the_output_in_every_mode(cell: Cell, training: bool) -> None:
    model = adapted(cell, torch.float32).train(training)
    x = data(cell, 4)
    base = cell.base()(x)
    least = cell.case.least_in_experts if cell.kind.startswith("experts") else 1e-2
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert (model(x) - base).abs().max() > least
    with torch.inference_mode():
        assert (model(x) - base).abs().max() > least


@every_cell("every layer ran", training=[True, False])
def test_every_adapted_layer_runs(cell: Cell, training: bool) -> None:
    """The output is another one when any one layer's adapter is taken away, with gradients and without."""
    model = adapted(cell, torch.float32).train(training)
    x = data(cell, 4)
    layers = layers_of(model)
    assert set(layers) == set(cell.kind_case.layers) or (cell.makes is Residual and set(layers) == {"layer"})
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = model(x)
            for name, layer in layers.items():
                held = layer.adapters
                layer.adapters = nn.ModuleDict()
                assert not torch.equal(model(x), before), name
                layer.adapters = held
            assert torch.equal(model(x), before)


@every_cell("parameters act")
def test_every_trained_number_gets_a_gradient_and_acts(cell: Cell) -> None:
    model = adapted(cell)
    x = data(cell, 16, dtype=torch.float64)
    before = model(x)
    before.square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        reached = parameter.grad.count_nonzero()
        assert reached == parameter.numel() or (cell.kind_case.ids and reached), name  # ids that did not come by
        with torch.no_grad():
            old = parameter.clone()
            parameter.add_(1.0)
            assert not torch.equal(model(x), before), name
            parameter.copy_(old)


@every_cell("count")
def test_the_number_of_parameters_follows_the_formula(cell: Cell) -> None:
    model = cell.model()
    expected = count(cell, model)
    assert sum(p.numel() for _, p in trained(model)) == expected
    assert sum(p.numel() for _, p in model.adapter_parameters()) == expected
    assert model.get_nb_trainable_parameters()[0] == expected
    base = sum(p.numel() for p in cell.base().parameters())
    frozen = sum(p.numel() for layer in layers_of(model).values() for p in layer.adapters.parameters()) - expected
    assert model.get_nb_trainable_parameters()[1] == base + expected + max(frozen, 0)


def _dropout(cell: Cell) -> list[str]:
    return [name for name in type(cell.config()).option_names() if name.endswith("dropout")]


WITH_DROPOUT = [cell for cell in CELLS if _dropout(cell) and cell.part.takes_dropout and not cell.part.substitutes]


@every_cell("dropout", WITH_DROPOUT)
def test_dropout_is_active_only_in_training(cell: Cell) -> None:
    (option,) = _dropout(cell)
    model = get_peft_model(cell.base(), cell.config(**{option: 0.5}))
    plain = get_peft_model(cell.base(), cell.config())
    with torch.no_grad():
        for (_, a), (_, b) in zip(model.adapter_parameters(), plain.adapter_parameters()):
            a.add_(1.0)
            b.copy_(a)
    x = data(cell, 64)
    model.eval()
    assert torch.equal(model(x), plain(x))
    model.train()
    torch.manual_seed(1)
    one, two = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), one)
    assert not torch.equal(one, two)
    with model.disable_adapter():
        assert torch.equal(model(x), cell.base()(x))
    if cell.makes is Residual:  # not linear, so a mean says nothing
        return
    # Its mean over many draws is the value without it.
    with torch.no_grad():
        few, draws = x[:2], 4000
        many = few.repeat(draws, *[1] * (few.ndim - 1))
        mean = model(many).unflatten(0, (draws, 2)).mean(0)
        expected, base = plain(few), cell.base()(few)
        spread = float((expected - base).abs().max())
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.15 * spread)


@every_cell("dtypes", dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_in_every_dtype_the_output_is_near_the_dense_layer(cell: Cell, dtype: torch.dtype) -> None:
    model = cell.model(dtype)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.5 * cell.kind_case.scale)
    x = data(cell, 4, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    reference = dense(cell, model, x)
    torch.testing.assert_close(y.double(), reference, rtol=0, atol=bound(reference, dtype))
    y.float().square().mean().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.dtype == torch.float32, name  # a small step must not be rounded away
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
    slots = (slot for layer in layers_of(model).values() for slot in layer.adapters.values())
    low = [delta for slot in slots if isinstance(delta := slot.delta(), LowRank)]
    assert all(delta.a.dtype == delta.b.dtype == dtype for delta in low)  # no float32 products in a 16-bit model


@every_cell("autocast")
def test_autocast_runs_and_trains(cell: Cell) -> None:
    model = adapted(cell, torch.float32)
    x = data(cell, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    reference = dense(cell, model, x)
    torch.testing.assert_close(y.double(), reference, rtol=0, atol=0.1 * (1 + float(reference.abs().max())))
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for _, p in model.adapter_parameters())


FIRST = [cell for cell in CELLS if cell.case is METHOD_CASES[cell.case.name][0]]


@every_cell("compile", FIRST, cost=50)
def test_it_compiles_as_one_graph(cell: Cell) -> None:
    compiles(cell)


@every_cell("compile", [cell for cell in CELLS if cell.case is not METHOD_CASES[cell.case.name][0]], quick=False)
def test_so_it_does_in_every_other_configuration(cell: Cell) -> None:
    compiles(cell)


def compiles(cell: Cell) -> None:
    torch.compiler.reset()
    model = adapted(cell, torch.float32)
    x = data(cell, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    grads = [p.grad.clone() for _, p in model.adapter_parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for compiled_grad, (name, parameter) in zip(grads, model.adapter_parameters()):
        torch.testing.assert_close(compiled_grad, parameter.grad, msg=name)
    with model.disable_adapter():  # the compiled code follows the switch
        assert torch.equal(compiled(x), cell.base()(x))
    assert not torch.equal(compiled(x), cell.base()(x))
