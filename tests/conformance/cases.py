"""The forms of the tables: how a method is configured, and an example of a layer kind.a way into a storage.

All of it is data and plain mathematics: numpy, and torch where a layer is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kilotune.deltas import Need
from kilotune.kinds import LayerKind

__all__ = ["INN", "OUT", "Array", "Formula", "KindCase", "Layer", "MethodCase", "Net", "OnOutput", "Params"]

OUT, INN = 5, 6
Array = np.ndarray[Any, np.dtype[np.float64]]
Layer = tuple[Array, Array | None]  # the canonical matrix (out, in) and the bias (out,)


class Params(dict[str, Array]):
    """An adapter's tensors in one layer by name, frozen and model-wide ones too; and where the layer stands.

    fan_in, kernel_positions: as in ``Site``. index: the place of the layer's matrix among all of the adapter. shapes:
    (out, in) of all of them, in order.
    """

    fan_in: int = 0
    kernel_positions: int = 1
    index: int = 0
    shapes: tuple[tuple[int, int], ...] = ()

    def like(self, values: Mapping[str, Array], index: int) -> Params:
        """Other values, of the matrix ``index``."""
        other = Params(values)
        other.fan_in, other.kernel_positions, other.index, other.shapes = (
            self.fan_in,
            self.kernel_positions,
            index,
            self.shapes,
        )
        return other


# (parameters, config, canonical matrix, bias) -> the adapted matrix and bias.
Formula = Callable[[Params, Any, Array, Array | None], Layer]
# (parameters, config, input, output) -> the adapted output, for what does not act on the weight.
OnOutput = Callable[[Params, Any, Array, Array], Array]


@dataclass(frozen=True)
class MethodCase:
    """One way to configure a method; ``name`` is what :func:`kilotune.get_config` takes, presets included.

    start: 'exact' (the output is the base's bits), 'near' (up to rounding) or 'moved' until it is trained.
    kinds: the names of the kinds to run it on; all that fit where left out. exact_gradient: whether its gradients
    are those of its formula; those of DoRA take a norm for a constant (the parameters named so are still exact).
    least_in_experts: how much random numbers change the outputs of experts at least. rounded: how far frozen numbers
    that are read from the weight may be from the formula's, relative to them.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    start: str = "exact"
    kinds: tuple[str, ...] = ()
    exact_gradient: tuple[str, ...] = ("*",)
    least_in_experts: float = 1e-2
    rounded: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.name}[{'-'.join(f'{key}={value}' for key, value in self.options.items())}]"


class Net(nn.Sequential):
    """``layer``, alone, so that every number can be checked."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.add_module("layer", layer)


@dataclass(frozen=True)
class KindCase:
    """An example of a layer kind: how to make one, and its plain mathematics.

    make: (with a bias) -> the layer. dense: (x, canonical matrix, bias or None) -> y of the net, in numpy.
    canonical: the weight as stored -> the canonical matrix (out, in), or (experts, out, in). name: of the variant;
    the first of a kind has none. optional_bias: it also exists without a bias; has_bias: and with one.
    features: (out, in) of the matrix. keyword: the name of its forward's input, where it has one.

    sample: the shape of one input without its leading dimensions; by default (in,). ids: inputs are whole numbers
    below this. forms: how many of the input forms of checks.forms it takes at least. fan_in, kernel_positions: as in
    ``Site``. matrices: the number of experts. net: puts the layer, as ``layer``, into a module of one input and output.
    targets: the config's options that take the layer. whole: instead of ``dense``, where several layers are adapted
    or the net holds other weights: (base net, x, {name of an adapted layer: (matrix, bias)}) -> y. kind: where no
    module is of it. bias_merges: a changed bias can be merged. layers: the names of the adapted layers. deep: it
    takes several leading dimensions. lacks: what this example does not have of what its kind offers. scale: how large
    the random values of an adapter are. axes: those of the output that are its features.
    """

    make: Callable[[bool], nn.Module]
    dense: Callable[[Array, Array, Array | None], Array] | None = None
    canonical: Callable[[Array], Array] = lambda weight: weight
    name: str = ""
    optional_bias: bool = True
    has_bias: bool = True
    features: tuple[int, int] = (OUT, INN)
    keyword: str = "input"
    sample: tuple[int, ...] = ()
    ids: int = 0
    forms: int = 6
    fan_in: int = 0
    kernel_positions: int = 1
    matrices: int = 0
    net: Callable[[nn.Module], nn.Module] = Net
    targets: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": ["layer"]})
    whole: Callable[[nn.Module, Array, Mapping[str, Layer]], Array] | None = None
    kind: LayerKind | None = None
    bias_merges: bool = True
    layers: tuple[str, ...] = ("layer",)
    lacks: frozenset[Need] = frozenset()
    scale: float = 1.0
    axes: tuple[int, ...] = (-1,)
    deep: bool = True

    @property
    def biases(self) -> tuple[bool, ...]:
        return (True, False) if self.optional_bias and self.has_bias else (self.has_bias,)

    def data(self, lead: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
        """A random input (lead..., sample...)."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids:
            return torch.randint(self.ids, lead, generator=generator)
        shape = (*lead, *(self.sample or (self.features[1],)))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
