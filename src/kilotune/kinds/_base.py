"""What a layer kind answers: how the weight is seen as the canonical matrix, how an input runs through
a factor of it. Knows nothing of methods and storage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from ..deltas import Need


class LayerKind(ABC):
    """One kind of layer. Stateless: one instance serves all layers.

    ``offers`` says which :class:`~kilotune.deltas.Need` a layer of this kind can meet; ``stores_in_out``
    is true where the weight is kept as (in, out), which PEFT calls ``fan_in_fan_out``.
    """

    name: ClassVar[str]
    offers: ClassVar[frozenset[Need]]
    stores_in_out: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this kind."""

    @abstractmethod
    def features(self, module: nn.Module) -> tuple[int, int]:
        """(out, in) of the canonical matrix, without reading the weight."""

    @abstractmethod
    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight as stored -> the canonical matrix (out, in); a view where possible."""

    @abstractmethod
    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        """The canonical matrix (out, in) -> the weight as stored."""

    @abstractmethod
    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        """Run the input through a first factor, or a whole matrix, (r, in): x (..., in) -> (..., r)."""

    @abstractmethod
    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        """Run (..., r) through a second factor (out, r) -> (..., out)."""

    def spread(self, vector: Tensor, like: Tensor) -> Tensor:
        """Shape a per-feature vector (n,) so that it broadcasts over ``like``'s features (the last axis)."""
        return vector

    def call(self, module: nn.Module, shift: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The base layer's output, with ``shift`` (out,) added to its bias where it is given."""
        output: Tensor = module(*args, **kwargs)
        return output if shift is None else output + self.spread(shift, output).to(output.dtype)
