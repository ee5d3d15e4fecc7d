"""Each cell, rows of one batch for different adapters: each row is what its adapter alone gives, or it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kilotune.errors import UnsupportedError
from kilotune.model.adapter_model import AdapterModel
from tests.conformance.cells import CELLS, Cell
from tests.conformance.checks import EPSILON, adapted, bound, data
from tests.conformance.declared import every_cell, every_quantised_cell
from tests.conformance.quantised import INN
from tests.conformance.quantised import Cell as QuantisedCell
from tests.support.models import randomize

NAMES: list[str | None] = ["other", None, "default", "other"]
# A weight that is one for all rows, or tokens that are regrouped inside.
REFUSED = ("attention", "experts")


def _refused(cell: Cell) -> bool:
    return cell.kind.startswith(REFUSED)


ROUTED = [cell for cell in CELLS if not _refused(cell)]


def two(cell: Cell, dtype: torch.dtype) -> AdapterModel:
    """The cell's model with a second adapter of the same kind."""
    model = adapted(cell, dtype)
    model.add_adapter("other", cell.config())
    model.to(dtype)
    randomize(model, "other", seed=3)
    return model.eval()


def alone(model: AdapterModel, name: str | None, x: Tensor) -> Tensor:
    if name is None:
        with model.disable_adapter():
            return model(x)  # type: ignore[no-any-return]
    model.set_adapter(name)
    return model(x)  # type: ignore[no-any-return]


@every_cell("routed", ROUTED)
def test_each_row_is_its_adapters(cell: Cell) -> None:
    model, x = two(cell, torch.float64), data(cell, 4, dtype=torch.float64)
    routed = model(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        own = alone(model, name, x)
        torch.testing.assert_close(routed[row], own[row], rtol=0, atol=bound(own, torch.float64))
    assert not torch.allclose(alone(model, "other", x)[0], alone(model, "default", x)[0], atol=1e-4)


@every_cell("routed gradients", ROUTED)
def test_gradients_are_those_of_its_rows_alone(cell: Cell) -> None:
    model, x = two(cell, torch.float64), data(cell, 4, dtype=torch.float64)
    weights: Tensor | None = None
    expected: dict[tuple[str, str], Tensor] = {}
    for name in ("default", "other"):
        y = alone(model, name, x)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if weights is None else weights
        mine = torch.tensor([n == name for n in NAMES]).view(-1, *[1] * (y.ndim - 1))
        (y * weights * mine).sum().backward()
        for key, p in model.adapter_parameters(name):
            if p.requires_grad:
                assert p.grad is not None
                expected[name, key] = p.grad.clone()
    wanting = [model.adapter_parameters("default"), model.adapter_parameters("other")]
    for (name, key), p in [((n, k), p) for n, ps in zip(("default", "other"), wanting, strict=True) for k, p in ps]:
        p.requires_grad_((name, key) in expected).grad = None
    assert weights is not None
    (model(x, adapter_names=NAMES) * weights).sum().backward()
    for name in ("default", "other"):
        for key, p in model.adapter_parameters(name):
            if (name, key) in expected:
                assert p.grad is not None, key
                torch.testing.assert_close(
                    p.grad,
                    expected[name, key],
                    rtol=1e-9,
                    atol=100 * EPSILON[torch.float64] * (1 + float(p.grad.abs().max())),
                )


@every_cell("routing refused", [cell for cell in CELLS if _refused(cell)])
def test_what_cannot_be_routed_says_why(cell: Cell) -> None:
    model = two(cell, torch.float64)
    with pytest.raises(UnsupportedError, match=r"rows cannot (go|be told)"):
        model(data(cell, 4, dtype=torch.float64), adapter_names=NAMES)


@every_quantised_cell()
def test_each_row_of_a_quantised_layer_is_its_adapters(cell: QuantisedCell) -> None:
    model, _ = cell.models()
    model.add_adapter("other", cell.config())
    randomize(model, "other", seed=3)
    model.eval()
    x = torch.randn(4, 3, INN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        routed = model(x, adapter_names=NAMES)
        for row, name in enumerate(NAMES):
            own = alone(model, name, x)
            near = 1e-4 + cell.scheme.noisy * float(own.abs().max())
            assert float((routed[row] - own[row]).abs().max()) < near, name
