"""transformers' ``Conv1D`` (GPT-2's linear layer): the weight is stored as (in, out)."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import Need
from ..kernels.lowrank import scale_features
from ._base import LayerKind


@final
class Conv1D(LayerKind):
    """y = x W + bias, weight (in, out). Recognised by name, so that transformers is never imported."""

    name: ClassVar[str] = "conv1d-transformers"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR, Need.BIAS, Need.OUTPUT})
    all_linear: ClassVar[bool] = True
    shares_input: ClassVar[bool] = True
    stores_in_out: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return any(
            cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils" for cls in type(module).__mro__
        )

    def features(self, module: nn.Module) -> tuple[int, int]:
        inn, out = module.get_parameter("weight").shape
        return out, inn

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.T

    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)

    def is_product(self, module: nn.Module, x: Tensor) -> bool:
        plain = type(module).forward.__module__ == "transformers.pytorch_utils"
        return plain and x.is_contiguous() and x.numel() > 0  # it refuses others, and with an adapter it shall too

    def feature_axis(self, module: nn.Module, y: Tensor) -> int:
        return -1

    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(h, matrix)

    def project_scaled(self, module: nn.Module, x: Tensor, matrix: Tensor, cols: Tensor) -> Tensor:
        return F.linear(scale_features(x, cols, 1.0), matrix)
