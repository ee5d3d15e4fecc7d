"""Each cell's forward and gradients against dense arithmetic written separately."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from conformance.cells import CELLS, COUNTS, KIND_CASES, OUT, Cell
from conformance.checks import EPSILON, adapted, data, dense, every_cell, forms, layer_of
from kilotune import get_peft_model
from kilotune.deltas import LowRank
from models import trained


@every_cell("forward")
def test_forward_is_the_dense_layer(cell: Cell) -> None:
    model, base = adapted(cell), cell.base(torch.float64)
    ran = 0
    for form, x in forms(cell).items():
        try:
            base(x)
        except RuntimeError:  # transformers' Conv1D takes no strided and no empty 3-D input
            with pytest.raises(RuntimeError):
                model(x)
            continue
        ran += 1
        y = model(x)
        assert y.shape == (*x.shape[:-1], OUT), form
        torch.testing.assert_close(
            y, dense(cell, model, x), rtol=0, atol=EPSILON[torch.float64], msg=lambda m, form=form: f"{form}: {m}"
        )
    assert ran >= 6


@every_cell("keyword")
def test_the_input_may_come_by_keyword(cell: Cell) -> None:
    model = adapted(cell)
    x = data(cell, 4, dtype=torch.float64)
    layer = layer_of(model)
    assert torch.equal(layer(**{KIND_CASES[cell.kind.name].keyword: x}), layer(x))


@every_cell("gradients")
def test_gradients_are_those_of_finite_differences(cell: Cell) -> None:
    model = adapted(cell)
    names = [name for name, _ in trained(model)]
    values = [p.detach().clone().requires_grad_() for _, p in trained(model)]
    assert names

    def run(x: Tensor, *params: Tensor) -> Any:
        return functional_call(model, dict(zip(names, params)), (x,))

    x = data(cell, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values))


@every_cell("input gradient")
def test_the_gradient_reaches_the_input(cell: Cell) -> None:
    """Through the base layer and through the adapter, whatever the storage does in its forward."""
    model = adapted(cell)
    x = data(cell, 3, dtype=torch.float64).requires_grad_()
    weights = torch.linspace(-1, 1, OUT, dtype=torch.float64)
    (model(x) @ weights).sum().backward()
    step = 1e-6
    assert x.grad is not None
    for i in range(x.shape[-1]):
        moved = torch.zeros_like(x[0])
        moved[i] = step
        change = (dense(cell, model, x.detach() + moved) - dense(cell, model, x.detach() - moved)) @ weights
        torch.testing.assert_close(x.grad[:, i], change / (2 * step), rtol=1e-6, atol=1e-7)


@every_cell("start")
def test_the_start_is_the_base(cell: Cell) -> None:
    model, base = cell.model(), cell.base()
    x = data(cell, 4)
    y, expected = model(x), base(x)
    assert torch.equal(y, expected) or cell.case.start != "exact"
    assert torch.allclose(y, expected, atol=1e-6) == (cell.case.start != "moved")


@every_cell("init")
def test_the_start_values_are_finite_float32_and_repeatable(cell: Cell) -> None:
    values = dict(cell.model().adapter_parameters())
    again = dict(cell.model().adapter_parameters())
    assert set(values) == set(again)
    for name, value in values.items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        assert torch.equal(value, again[name])


@every_cell("acts")
@pytest.mark.parametrize("training", [True, False])
def test_a_trained_adapter_changes_the_output_in_every_mode(cell: Cell, training: bool) -> None:
    model = adapted(cell, torch.float32).train(training)
    x = data(cell, 4)
    base = cell.base()(x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert (model(x) - base).abs().max() > 1e-2
    with torch.inference_mode():
        assert (model(x) - base).abs().max() > 1e-2


@every_cell("parameters act")
def test_every_trained_number_gets_a_gradient_and_acts(cell: Cell) -> None:
    model = adapted(cell)
    x = data(cell, 16, dtype=torch.float64)
    before = model(x)
    before.square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.count_nonzero() == parameter.numel(), name
        with torch.no_grad():
            old = parameter.clone()
            parameter.add_(1.0)
            assert not torch.equal(model(x), before), name
            parameter.copy_(old)


@every_cell("count")
def test_the_number_of_parameters_follows_the_formula(cell: Cell) -> None:
    model = cell.model()
    config = cell.config()
    out, inn = KIND_CASES[cell.kind.name].features
    trains_bias = config.bias != "none" and layer_of(model).base_layer.bias is not None
    expected = COUNTS[cell.case.name](config, out, inn) + (out if trains_bias else 0)
    assert sum(p.numel() for _, p in trained(model)) == expected
    assert sum(p.numel() for _, p in model.adapter_parameters()) == expected
    assert model.get_nb_trainable_parameters()[0] == expected
    base = sum(p.numel() for p in cell.base().parameters())
    assert model.get_nb_trainable_parameters()[1] == expected + base


WITH_DROPOUT = [cell for cell in CELLS if any(name.endswith("_dropout") for name in cell.config().option_names())]


@every_cell("dropout", WITH_DROPOUT)
def test_dropout_is_active_only_in_training(cell: Cell) -> None:
    (option,) = (name for name in type(cell.config()).option_names() if name.endswith("_dropout"))
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
    # Its mean over many draws is the value without it.
    with torch.no_grad():
        mean, expected, base = model(x[:2].repeat(4000, 1, 1)).mean(0), plain(x[:2]), cell.base()(x[:2])
        spread = float((expected - base).abs().max())
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.15 * spread)


@every_cell("dtypes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_every_dtype_the_output_is_near_the_dense_layer(cell: Cell, dtype: torch.dtype) -> None:
    model = cell.model(dtype)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.5)
    x = data(cell, 4, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    reference = dense(cell, model, x)
    bound = EPSILON[dtype] * (1 + float(reference.abs().max()))
    torch.testing.assert_close(y.double(), reference, rtol=0, atol=bound)
    y.float().square().sum().backward()
    for name, parameter in model.adapter_parameters():
        assert parameter.dtype == torch.float32, name  # a small step must not be rounded away
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
    low = [delta for slot in layer_of(model).adapters.values() if isinstance(delta := slot.delta(), LowRank)]
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


@every_cell("compile")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_as_one_graph(cell: Cell, backend: str) -> None:
    torch.compiler.reset()
    model = adapted(cell, torch.float32)
    x = data(cell, 4)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
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
