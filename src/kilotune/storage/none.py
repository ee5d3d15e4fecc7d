"""Modules that keep no weight of their own: the layers inside them do."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ._base import Kept, Storage


@final
class Held(Storage):
    """Nothing to read and nothing to write; dtype and device are those of the first floats inside."""

    name: ClassVar[str] = "none"
    lossless: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        # A computed weight (torch.nn.utils.parametrize) is kept in modules too, but that is a layer.
        own = {"parametrizations"} & module._modules.keys() or {"weight", "bias"} & module._parameters.keys()
        return bool(module._modules) and not own

    def read(self, module: nn.Module, kept: Kept | None = None, dtype: torch.dtype | None = None) -> Tensor:
        raise UnsupportedError(f"{type(module).__name__} has no weight of its own")

    def read_bias(self, module: nn.Module, kept: Kept | None = None) -> Tensor | None:
        return None

    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        if weight is not None or bias is not None:
            raise UnsupportedError(f"{type(module).__name__} has no weight of its own")

    def keep(self, module: nn.Module) -> Kept:
        return {}

    def restore(self, module: nn.Module, kept: Kept) -> None:
        return

    def dtype(self, module: nn.Module) -> torch.dtype:
        return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def device(self, module: nn.Module) -> torch.device:
        return next((p.device for p in module.parameters()), torch.device("cpu"))
