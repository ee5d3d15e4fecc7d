"""What the conformance tests compute: the dense reference, and inputs of every form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kilotune.layers.adapted import AdaptedLayer
from kilotune.model.adapter_model import AdapterModel
from tests.conformance.cases import Array, Layer, Params
from tests.conformance.cells import FORMULAS, ON_OUTPUT, Cell
from tests.support.models import is_base, plain_name

__all__ = ["EPSILON", "adapted", "bound", "count", "data", "dense", "far", "forms", "layer_of", "layers_of"]

# Rounding of a sum of a few dozen terms of size one.
EPSILON = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 0.1, torch.float16: 0.02}


def data(cell: Cell, *lead: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    """A random input: ``lead`` dimensions, then those of one input of the layer."""
    return cell.kind_case.data(lead, dtype, seed)


def forms(cell: Cell, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of every form; a layer takes those that its base takes."""
    deep, rows = data(cell, 2, 3, dtype=dtype), data(cell, 4, dtype=dtype)
    found = {
        "one row": data(cell, dtype=dtype),
        "rows": rows,
        "3-D": deep,
        "5-D": data(cell, 2, 1, 2, 3, dtype=dtype),
        "no rows": data(cell, 0, dtype=dtype),
        "no rows, 3-D": data(cell, 3, 0, dtype=dtype),
        "not contiguous": deep.transpose(0, 1),
        "strided": data(cell, 8, dtype=dtype)[::2],
        "expanded": data(cell, 1, dtype=dtype).expand(4, *rows.shape[1:]),
    }
    if rows.ndim == 4:
        found["channels last"] = rows.to(memory_format=torch.channels_last)
    return found


def layers_of(model: AdapterModel) -> Mapping[str, AdaptedLayer]:
    """The adapted layers of a cell's model by name."""
    return model.adapted_layers()


def layer_of(model: AdapterModel) -> AdaptedLayer:
    """The one adapted layer of a cell's model; the first where its example has several."""
    return next(iter(model.adapted_layers().values()))


def adapted(cell: Cell, dtype: torch.dtype = torch.float64) -> AdapterModel:
    """A cell's model in ``dtype``, the adapter's vectors too, with random values in them."""
    model = cell.model(dtype).to(dtype)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((cell.kind_case.scale * value).to(dtype))
    return model


def bound(reference: Tensor, dtype: torch.dtype) -> float:
    """How far the outputs of a layer that computes in ``dtype`` may be from ``reference``."""
    return EPSILON[dtype] * (1 + float(reference.detach().abs().max()))


def far(a: Tensor, b: Tensor) -> float:
    """The relative distance of ``a`` from ``b``, by their norms."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def count(cell: Cell, model: AdapterModel) -> int:
    """How many numbers the adapter trains, by the method's formula, biases included."""
    config = cell.config()
    layers = layers_of(model).values()
    # The option ``bias`` reaches what is called so: not attention's in_proj_bias, not the biases of experts.
    called_so = [layer for layer in layers if "bias" in layer.base_layer._parameters]
    biases = [bias for layer in called_so if (bias := layer.base_bias()) is not None]
    trained = sum(bias.numel() for bias in biases) if config.bias != "none" else 0
    installed = model.installed("default")
    sites = [slot.site for slot in installed.slots().values()]
    each = [site for site in sites for _ in range(site.matrices or 1)]
    return installed.method.count(each) + trained


def _array(value: Tensor) -> Array:
    array: Array = value.detach().double().numpy()
    return array


def dense(cell: Cell, model: AdapterModel, x: Tensor) -> Tensor:
    """The output of the plain net with the formula's weights and the trained biases, in numpy's float64."""
    case, name, config = cell.kind_case, cell.case.name, cell.config()
    layers = plain_layers(cell, model)
    if name not in ON_OUTPUT:
        layers = changed(cell, model, layers)
    if case.whole is not None:
        y = case.whole(_plain(cell, model), _input(x), layers)
    else:
        assert case.dense is not None
        ((matrix, bias),) = layers.values()
        y = case.dense(_input(x), matrix, bias)
    if name in ON_OUTPUT:
        places = [_features_last(a, case.axes) for a in (_input(x), y)] if not case.ids else [_input(x), y]
        new = ON_OUTPUT[name](_params(cell, model, next(iter(layers))), config, *places)
        y = new if len(case.axes) == 1 and case.axes[0] == -1 else _features_back(new, y, case.axes)
    return torch.from_numpy(np.ascontiguousarray(y))


def _features_last(a: Array, axes: tuple[int, ...]) -> Array:
    """The axes of the features as one, the last."""
    moved = np.moveaxis(a, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)


def _features_back(a: Array, like: Array, axes: tuple[int, ...]) -> Array:
    sizes = [like.shape[axis] for axis in axes]
    return np.moveaxis(a.reshape(*a.shape[:-1], *sizes), range(-len(axes), 0), axes)


def _plain(cell: Cell, model: AdapterModel) -> nn.Module:
    """The base net without its adapters, in float64, with the weights as they are in ``model``."""
    held = {plain_name(key): value for key, value in model.state_dict().items() if is_base(key)}
    net = cell.base(torch.float64)
    net.load_state_dict(held)
    return net


def plain_layers(cell: Cell, model: AdapterModel) -> dict[str, Layer]:
    """Matrix and bias of each adapted layer as they are in the base, with trained biases in place."""
    found = {}
    for name, layer in layers_of(model).items():
        bias = _params(cell, model, name).get("bias")
        if bias is None and (own := layer.base_bias()) is not None:
            bias = _array(own)
        if bias is not None and not cell.kind_case.matrices:
            bias = bias.reshape(-1)
        none = layer.base_layer._parameters.get(layer.storage.weight_name) is None
        if none or layer.kind.name == "attention-split":  # no weight, or several
            found[name] = (np.zeros(()), bias)
        else:
            found[name] = (cell.kind_case.canonical(_array(layer.storage.read(layer.base_layer))), bias)
    return found


def changed(cell: Cell, model: AdapterModel, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same, changed by the method's formula; experts one by one. Without a formula: by the method's own delta."""
    if cell.case.name not in FORMULAS:
        return {name: _by_delta(model, name, layer) for name, layer in layers.items()}
    config, case, formula = cell.config(), cell.kind_case, FORMULAS[cell.case.name]
    shapes = [matrix.shape[-2:] for matrix, _ in layers.values() for _ in range(case.matrices or 1)]
    found, index = {}, 0
    for name, (matrix, bias) in layers.items():
        params = _params(cell, model, name)
        params.shapes = tuple(shapes)
        if not case.matrices:
            params.index, index = index, index + 1
            found[name] = formula(params, config, matrix, bias)
            continue
        parts = []
        for e in range(case.matrices):
            own = {k: v if k in model_wide(model) else v[e] for k, v in params.items()}
            one = params.like(own, index=index + e)
            parts.append(formula(one, config, matrix[e], None if bias is None else bias[e]))
        index += case.matrices
        biases = [b for _, b in parts if b is not None]
        found[name] = (np.stack([m for m, _ in parts]), np.stack(biases) if biases else None)
    return found


def _by_delta(model: AdapterModel, name: str, layer: Layer) -> Layer:
    """Matrix and bias changed as the layer's delta says, in float64."""
    matrix, bias = layer
    slot = layers_of(model)[name].slot("default")
    assert slot is not None
    delta = slot.delta()
    change = delta.weight_change(torch.from_numpy(matrix))
    moved = delta.bias_change(None if bias is None else torch.from_numpy(bias))
    if moved is not None:
        bias = _array(moved) if bias is None else bias + _array(moved)
    return (matrix if change is None else matrix + _array(change)), bias


def model_wide(model: AdapterModel) -> set[str]:
    """The names of the tensors that the adapter has once for the whole model."""
    layers = tuple(f"{name}." for name in layers_of(model))
    return {name for name, _ in model.adapter_parameters() if not name.startswith(layers)}


def _params(cell: Cell, model: AdapterModel, name: str) -> Params:
    slot = layers_of(model)[name].slot("default")
    assert slot is not None
    wide = {key: p for key, p in model.adapter_parameters() if key in model_wide(model)}
    found = Params({key: _array(p) for key, p in (*slot.named_parameters(), *wide.items())})
    found.fan_in, found.kernel_positions = cell.kind_case.fan_in, cell.kind_case.kernel_positions
    return found


def _input(x: Tensor) -> Array:
    return x.numpy() if not x.is_floating_point() else _array(x)
