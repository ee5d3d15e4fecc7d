"""What the conformance tests compute: the dense reference, and inputs of every form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conformance.cells import CELLS, EXCEPTIONS, FORMULAS, KIND_CASES, ON_OUTPUT, Array, Cell
from kilotune.layer import AdaptedLayer
from kilotune.model import AdapterModel

__all__ = ["EPSILON", "adapted", "data", "dense", "every_cell", "forms", "layer_of", "width"]

# Rounding of a sum of a few dozen terms of size one.
EPSILON = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


def every_cell(test: str, cells: list[Cell] = CELLS) -> pytest.MarkDecorator:
    """Parametrize over the cells; those that EXCEPTIONS names are skipped with their reason."""
    parameters = []
    for cell in cells:
        keys = ((cell.case.name, cell.kind.name, cell.storage.name, name) for name in (test, "*"))
        reason = next((EXCEPTIONS[key] for key in keys if key in EXCEPTIONS), None)
        marks = [] if reason is None else [pytest.mark.skip(reason=reason)]
        parameters.append(pytest.param(cell, id=cell.id, marks=marks))
    return pytest.mark.parametrize("cell", parameters)


def width(cell: Cell) -> int:
    """The number of input features."""
    return KIND_CASES[cell.kind.name].features[1]


def data(cell: Cell, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    """A random input (shape..., features)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, width(cell), generator=generator, dtype=torch.float64).to(dtype)


def forms(cell: Cell, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Inputs of every form; a layer takes those that its base takes."""
    deep = data(cell, 2, 3, dtype=dtype)
    return {
        "one row": data(cell, dtype=dtype),
        "rows": data(cell, 4, dtype=dtype),
        "3-D": deep,
        "5-D": data(cell, 2, 1, 2, 3, dtype=dtype),
        "no rows": data(cell, 0, dtype=dtype),
        "no rows, 3-D": data(cell, 3, 0, dtype=dtype),
        "not contiguous": deep.transpose(0, 1),
        "strided": data(cell, 8, dtype=dtype)[::2],
        "expanded": data(cell, 1, dtype=dtype).expand(4, -1),
    }


def layer_of(model: AdapterModel) -> AdaptedLayer:
    """The one adapted layer of a cell's model."""
    (layer,) = model.adapted_layers().values()
    return layer


def adapted(cell: Cell, dtype: torch.dtype = torch.float64) -> AdapterModel:
    """A cell's model in ``dtype``, the adapter's vectors too, with random values in them."""
    model = cell.model(dtype).to(dtype)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model


def _array(value: Tensor) -> Array:
    array: Array = value.detach().double().numpy()
    return array


def dense(cell: Cell, model: AdapterModel, x: Tensor) -> Tensor:
    """The output of one dense layer with the formula's weight and the trained bias, in numpy's float64."""
    base, kind, config = layer_of(model).base_layer, KIND_CASES[cell.kind.name], cell.config()
    params = {name.removeprefix("layer."): _array(p) for name, p in model.adapter_parameters()}
    bias = None if base.bias is None else _array(base.bias)
    matrix, bias = kind.canonical(_array(base.weight)), params.get("bias", bias)
    if cell.case.name in FORMULAS:
        matrix, bias = FORMULAS[cell.case.name](params, config, matrix, bias)
    y = kind.dense(_array(x), matrix, bias)
    if cell.case.name in ON_OUTPUT:
        y = ON_OUTPUT[cell.case.name](params, config, _array(x), y)
    return torch.from_numpy(y)
