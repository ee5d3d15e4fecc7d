"""What a layer kind answers: how the weight is seen as the canonical matrix, how an input runs through
a factor of it. Knows nothing of methods and storage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..deltas import Need, Role

__all__ = ["LayerKind"]


class LayerKind(ABC):
    """One kind of layer. Stateless: one instance serves all layers.

    offers: which :class:`~kilotune.deltas.Need` a layer of this kind can meet. stores_in_out: the weight is
    kept as (in, out), which PEFT calls ``fan_in_fan_out``. substitutes: the layer's input reaches no factor
    (attention has three inputs), so the layer runs with a weight that is built for each step; dropout on the
    adapter's input is then refused. takes_dropout: dropout on the input makes sense (not for token ids, where
    it is left out, as in PEFT). file_keys: a method's key in a checkpoint -> PEFT's key for this kind.
    """

    name: ClassVar[str]
    offers: ClassVar[frozenset[Need]]
    stores_in_out: ClassVar[bool] = False
    substitutes: ClassVar[bool] = False
    takes_dropout: ClassVar[bool] = True
    file_keys: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""

    @abstractmethod
    def features(self, module: nn.Module) -> tuple[int, int]:
        """(out, in) of the canonical matrix, without reading the weight."""

    def fan_in(self, module: nn.Module) -> int:
        """How many columns of the matrix one input meets at once: all of them, but 1 in an embedding."""
        return self.features(module)[1]

    def taps(self, module: nn.Module) -> int:
        """How many neighbouring columns of the matrix belong to one input feature: a convolution's kernel size."""
        return 1

    # -- the matrix ------------------------------------------------------------------------------

    @abstractmethod
    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight as stored -> the canonical matrix (out, in); a view where possible."""

    @abstractmethod
    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The canonical matrix (out, in) -> the weight as stored."""

    # -- running ---------------------------------------------------------------------------------

    @abstractmethod
    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """Run the input through a first factor, or a whole matrix, (r, in): x (..., in) -> (..., r)."""

    @abstractmethod
    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        """Run (..., r) through a second factor (out, r) -> (..., out)."""

    def project_scaled(self, module: nn.Module, x: Tensor, matrix: Tensor, cols: Tensor) -> Tensor:
        """Run the input through ``matrix diag(cols)``, cols (in,)."""
        wide = torch.promote_types(matrix.dtype, cols.dtype)
        return self.project(module, x, (matrix.to(wide) * cols).to(matrix.dtype))

    def spread(self, vector: Tensor, like: Tensor) -> Tensor:
        """Shape a per-feature vector (n,) so that it broadcasts over ``like``'s features (the last axis)."""
        return vector

    def call(self, module: nn.Module, shift: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The base layer's output, with ``shift`` (out,) added to its bias where it is given."""
        output = module(*args, **kwargs)
        if shift is None:
            return output
        y = self.tensor_of(output)
        return self.with_tensor(output, y + self.spread(shift, y).to(y.dtype))

    def run_with(
        self, module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The output of ``module`` with other parameters, by name; where the kind ``substitutes``."""
        return functional_call(module, weights, args, kwargs)

    def tensor_of(self, output: Any) -> Tensor:
        """The tensor in what the layer returned: itself, or the first of several."""
        first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return first

    def with_tensor(self, output: Any, tensor: Tensor) -> Any:
        """What the layer returned, with another tensor in it."""
        return type(output)((tensor, *output[1:])) if isinstance(output, (tuple, list)) else tensor

    # -- files -----------------------------------------------------------------------------------

    def to_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """One of a method's tensors as PEFT keeps it for this kind of layer."""
        return tensor

    def from_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`to_file`; the shape has been checked."""
        return tensor
