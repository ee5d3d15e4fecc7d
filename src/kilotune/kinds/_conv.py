"""What the convolutions of one, two and three dimensions share.

The canonical matrix is the weight with its input channels and its kernel's positions in one axis,
(out, in / groups * kernel). Its rows form as many blocks as there are groups, and block g meets the input channels of
group g only. A first factor (r, in / groups * kernel) has no such blocks: it runs on every group, and its r outputs of
group g go to block g of the second factor. So the low-rank change of a grouped convolution is the same product
b a as anywhere else, and no dense matrix is built.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deltas import Need, Role
from ..errors import CheckpointError
from ._base import LayerKind

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(LayerKind):
    """y = weight * x + bias, weight (out, in / groups, kernel...), x (batch, in, space...) or (in, space...).

    Whatever the layer does with its input (stride, dilation, padding and its mode) is done with the factors too.
    """

    offers: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR, Need.BIAS, Need.OUTPUT})
    torch_class: ClassVar[type[nn.Module]]
    dimensions: ClassVar[int]

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, self.torch_class)

    def refusal(self, module: nn.Module) -> str | None:
        own = (getattr(type(module), name) is getattr(self.torch_class, name) for name in ("forward", "_conv_forward"))
        if all(own):
            return None
        return (
            f"{type(module).__name__} does not run as torch's {self.torch_class.__name__} does (it has a forward of "
            "its own), so a change of its weight cannot be run beside it"
        )

    def features(self, module: nn.Module) -> tuple[int, int]:
        inn = _number(module, "in_channels") // _groups(module) * self.kernel_positions(module)
        return _number(module, "out_channels"), inn

    def groups(self, module: nn.Module) -> int:
        return _groups(module)

    def kernel_positions(self, module: nn.Module) -> int:
        return math.prod(_kernel(module))

    def input_features(self, module: nn.Module) -> int:
        return 0

    def features_last(self, module: nn.Module, y: Tensor) -> Tensor:
        return y.movedim(-1 - self.dimensions, -1)

    def features_back(self, module: nn.Module, y: Tensor) -> Tensor:
        return y.movedim(-1, -1 - self.dimensions)

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], -1, *_kernel(module))

    def run(self, module: nn.Module, x: Tensor, matrix: Tensor, cols: Tensor | None = None) -> Tensor:
        if cols is not None:
            wide = torch.promote_types(matrix.dtype, cols.dtype)
            matrix = (matrix.to(wide) * cols).to(matrix.dtype)
        return self._convolve(module, x, self.native(module, matrix))

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        weight = self.native(module, matrix)  # (r, in / groups, kernel...)
        groups = _groups(module)
        if groups > 1:
            weight = weight.repeat(groups, *[1] * (weight.ndim - 1))  # (groups * r, in / groups, kernel...)
        return self._convolve(module, x, weight)

    def feature_axis(self, module: nn.Module, y: Tensor) -> int | None:
        return 1 if _groups(module) == 1 and y.ndim == self.dimensions + 2 else None

    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        weight = matrix.reshape(*matrix.shape, *[1] * self.dimensions)  # (out, r, 1...)
        return _CONVOLVE[self.dimensions](h, weight, groups=_groups(module))

    def spread(self, vector: Tensor, like: Tensor) -> Tensor:
        channels = like.shape[-self.dimensions - 1]
        if channels != vector.numel():  # the r outputs of a first factor, once for each group
            vector = vector.repeat(channels // vector.numel())
        return vector.reshape(-1, *[1] * self.dimensions)

    @abstractmethod
    def _convolve(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's own convolution with another weight and no bias."""

    # -- files -----------------------------------------------------------------------------------

    def to_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        ones = [1] * self.dimensions
        if role is Role.FIRST:
            return self.native(module, tensor)
        if role is Role.SECOND:
            return tensor.reshape(*tensor.shape, *ones)
        return tensor.reshape(1, -1, *ones) if role in (Role.ROWS, Role.COLS) else tensor

    def to_blocks(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """PEFT's first factor sees all channels, and its second one falls into groups: block g of the first factor,
        which the second takes in group g, is zero but for the channels of group g.
        """
        own = self.to_file(module, role, tensor)
        if role is not Role.FIRST:
            return own
        groups, (rank, inn) = _groups(module), own.shape[:2]
        blocks = own.new_zeros(groups, rank, groups, inn, *own.shape[2:])
        for g in range(groups):
            blocks[g, :, g] = own
        return blocks.reshape(groups * rank, groups * inn, *own.shape[2:])

    def peft_shape(self, module: nn.Module, role: Role, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        groups = _groups(module)
        if groups == 1 or role not in (Role.FIRST, Role.SECOND):
            return None
        rank = shape[0] if role is Role.FIRST else shape[1]
        if rank % groups:
            return None
        if role is Role.FIRST:
            return (shape[0], _number(module, "in_channels"), *_kernel(module))
        return (shape[0], shape[1] // groups, *[1] * self.dimensions)

    def from_blocks(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        """The rank is PEFT's: row j of the first factor belongs to one group, so the second is zero elsewhere."""
        groups = _groups(module)
        if role is Role.FIRST:
            parts = tensor.reshape(groups, -1, groups, tensor.shape[1] // groups, *_kernel(module))
            own = torch.stack([parts[g, :, g] for g in range(groups)])  # (groups, r / groups, in / groups, kernel...)
            if parts.count_nonzero() != own.count_nonzero():
                raise CheckpointError(
                    f"its first factor mixes the channels of the {groups} groups of this {type(module).__name__}, so "
                    "it is no change of the layer's weight (PEFT cannot merge it either); only one whose groups keep "
                    "to their own channels can be read"
                )
            return own.reshape(tensor.shape[0], -1)
        parts = tensor.reshape(groups, -1, tensor.shape[1])  # (groups, out / groups, r / groups)
        own = parts.new_zeros(groups, parts.shape[1], groups, parts.shape[2])
        for g in range(groups):
            own[g, :, g] = parts[g]
        return own.reshape(tensor.shape[0], -1)

    def from_file(self, module: nn.Module, role: Role, tensor: Tensor) -> Tensor:
        if role in (Role.FIRST, Role.SECOND):
            return tensor.flatten(1)
        return tensor.flatten() if role in (Role.ROWS, Role.COLS) else tensor


def _number(module: nn.Module, name: str) -> int:
    value: Any = getattr(module, name)
    return int(value)


def _groups(module: nn.Module) -> int:
    return _number(module, "groups")


def _kernel(module: nn.Module) -> tuple[int, ...]:
    value: Any = module.kernel_size
    return tuple(value)
