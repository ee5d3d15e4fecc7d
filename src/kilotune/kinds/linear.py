"""``torch.nn.Linear``: the weight is the canonical matrix."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import Need
from ..kernels.lowrank import scale_features
from ._base import LayerKind


@final
class Linear(LayerKind):
    """y = x W^T + bias, weight (out, in)."""

    name: ClassVar[str] = "linear"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR, Need.BIAS, Need.OUTPUT})
    all_linear: ClassVar[bool] = True
    shares_input: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear)
        return module.out_features, module.in_features

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def is_product(self, module: nn.Module, x: Tensor) -> bool:
        return type(module).forward is nn.Linear.forward

    def feature_axis(self, module: nn.Module, y: Tensor) -> int:
        return -1

    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def project_scaled(self, module: nn.Module, x: Tensor, matrix: Tensor, cols: Tensor) -> Tensor:
        return F.linear(scale_features(x, cols, 1.0), matrix)
