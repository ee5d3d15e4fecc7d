"""Each cell, rows of one batch for stacks: a row is what its adapters give when they are active together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kilotune import PeftModel, get_peft_model
from kilotune.deltas import Residual
from kilotune.errors import UnsupportedError
from kilotune.model.adapter_model import AdapterModel
from tests.conformance.cells import CELLS, METHOD_CASES, Cell, config_of, delta_of
from tests.conformance.checks import EPSILON, adapted, bound, data
from tests.conformance.declared import every_cell, every_quantised_cell
from tests.conformance.quantised import INN, QUANTISED, first_of_each_delta
from tests.conformance.quantised import Cell as QuantisedCell
from tests.conformance.test_routed import _refused
from tests.support.models import Nested, randomize

Row = str | Sequence[str] | None
BOTH = ["default", "other"]
ROWS: list[Row] = [BOTH, "other", ["other", "default"], None, ["default"], BOTH]
ROUTED = [cell for cell in CELLS if not _refused(cell)]
STACKED = [cell for cell in ROUTED if cell.makes is not Residual]


def two(cell: Cell) -> AdapterModel:
    """The cell's model with a second adapter of the same kind."""
    model = adapted(cell, torch.float64)
    model.add_adapter("other", cell.config())
    model.to(torch.float64)
    randomize(model, "other", seed=3)
    return model.eval()


def active(model: AdapterModel, row: Row, x: Tensor) -> Tensor:
    """What the model gives with the adapters of a row active."""
    if row is None:
        with model.disable_adapter():
            return model(x)  # type: ignore[no-any-return]
    model.set_adapter(row)
    return model(x)  # type: ignore[no-any-return]


@every_cell("stacked", STACKED)
def test_each_row_is_what_its_adapters_are_together(cell: Cell) -> None:
    model, x = two(cell), data(cell, len(ROWS), dtype=torch.float64)
    routed = model(x, adapter_names=ROWS)
    for place, row in enumerate(ROWS):
        own = active(model, row, x)
        torch.testing.assert_close(routed[place], own[place], rtol=0, atol=bound(own, torch.float64), msg=str(row))
    alone = active(model, "other", x)
    assert not torch.allclose(routed[0], alone[0], atol=1e-4)  # the one beneath does something


@every_cell("stacked gradients", STACKED)
def test_gradients_of_a_stack_are_those_of_its_adapters_together(cell: Cell) -> None:
    model, x = two(cell), data(cell, 4, dtype=torch.float64)
    rows: list[Row] = [BOTH, BOTH, "other", BOTH]
    expected: dict[tuple[str, str], Tensor] = {}
    for row, places in ((BOTH, [0, 1, 3]), ("other", [2])):
        y = active(model, row, x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        (y * weights)[places].sum().backward()
        for name in model.active_adapters:
            for key, p in model.adapter_parameters(name):
                if p.grad is not None:
                    expected[name, key] = expected.get((name, key), 0) + p.grad
                    p.grad = None
    model.set_adapter(BOTH)
    (model(x, adapter_names=rows) * weights).sum().backward()
    assert expected
    for name in BOTH:
        for key, p in model.adapter_parameters(name):
            if (name, key) in expected:
                assert p.grad is not None, key
                near = 100 * EPSILON[torch.float64] * (1 + float(p.grad.abs().max()))
                torch.testing.assert_close(p.grad, expected[name, key], rtol=1e-9, atol=near)


@every_cell("stacks refused", [cell for cell in ROUTED if cell.makes is Residual])
def test_two_that_are_not_linear_are_refused_as_in_a_model(cell: Cell) -> None:
    model = two(cell)
    for attempt in (lambda: model.set_adapter(BOTH), lambda: model(data(cell, 1), adapter_names=[BOTH])):
        with pytest.raises(UnsupportedError, match="'default' and 'other' are both not linear"):
            attempt()


@every_quantised_cell(first_of_each_delta([cell for cell in QUANTISED if delta_of(cell.case).mergeable]))
def test_a_stack_on_a_quantised_layer(cell: QuantisedCell) -> None:
    model, _ = cell.models()
    model.add_adapter("other", cell.config())
    randomize(model, "other", seed=3)
    model.eval()
    x = torch.randn(len(ROWS), 3, INN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        routed = model(x, adapter_names=ROWS)
        for place, row in enumerate(ROWS):
            own = active(model, row, x)
            near = 1e-4 + cell.scheme.noisy * float(own.abs().max())
            assert float((routed[place] - own[place]).abs().max()) < near, row


# -- one method on another ---------------------------------------------------------------------------

LAYERS = ["blocks.0.mix.up", "blocks.1.mix.down", "head"]
METHODS = {name: cases[-1] for name, cases in METHOD_CASES.items() if not cases[-1].kinds}


def pair(lower: str, upper: str, bases: Sequence[str] = LAYERS) -> PeftModel:
    model = get_peft_model(Nested().double(), config_of(METHODS[lower], target_modules=list(bases)), "lower")
    model.add_adapter("upper", config_of(METHODS[upper], target_modules=list(LAYERS)))
    model.double()
    for i, name in enumerate(("lower", "upper")):
        randomize(model, name, seed=7 + i, scale=0.3)
    return model.eval()


@pytest.mark.parametrize("upper", METHODS)
def test_any_method_on_any_other(upper: str) -> None:
    """The lower one in some of the upper one's layers alone, and in all."""
    x = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for lower in METHODS:
        model = pair(lower, upper, LAYERS[:2] if len(lower) % 2 else LAYERS)
        rows: list[Row] = [["lower", "upper"], "upper", None, ["upper", "lower"], ["lower", "upper"]]
        if delta_of(METHODS[lower]) is delta_of(METHODS[upper]) is Residual:
            with pytest.raises(UnsupportedError, match="both not linear"):
                model.set_adapter(["lower", "upper"])
            with pytest.raises(UnsupportedError, match="both not linear"):
                model(x, adapter_names=rows)
            continue
        routed = model(x, adapter_names=rows)
        for place, row in enumerate(rows):
            own = active(model, row, x)[place]
            near = 10 * bound(own, torch.float64)
            torch.testing.assert_close(routed[place], own, rtol=0, atol=near, msg=f"{lower}, {upper}: {row}")
