"""Plain floating-point parameters."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # `import torch` has loaded it

from ..errors import UnsupportedError
from ._base import Kept, Storage
from .sharded import SHARDED, is_sharded

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@final
class Dense(Storage):
    """float16, bfloat16, float32 or float64 parameters.

    Args:
        weight_name, bias_name: what the module calls them.

    Writing puts new Parameters in place and never changes the old ones, so a weight that is tied to
    another module's (an embedding) stays as it is there.
    """

    name: ClassVar[str] = "dense"
    lossless: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    def __init__(self, weight_name: str = "weight", bias_name: str = "bias") -> None:
        self.weight_name, self.bias_name = weight_name, bias_name

    @property
    def names(self) -> tuple[str, str]:
        """The names of the weight and of the bias."""
        return self.weight_name, self.bias_name

    def matches(self, module: nn.Module) -> bool:
        names = self.names
        if any(name not in module._parameters and isinstance(getattr(module, name, None), Tensor) for name in names):
            return False  # computed from other parameters (weight norm, pruning): nothing here to write to
        held = [module._parameters.get(name) for name in names]
        present = [p for p in held if p is not None]
        return bool(present) and all(p.dtype in FLOATS and (type(p.data) is Tensor or is_sharded(p)) for p in present)

    def read(self, module: nn.Module, kept: Kept | None = None, dtype: torch.dtype | None = None) -> Tensor:
        held = None if kept is None else kept.get(self.weight_name)
        weight = module.get_parameter(self.weight_name) if held is None else held
        if is_sharded(weight):
            raise UnsupportedError(
                f"the weight of a {type(module).__name__} {SHARDED}; shard the blocks, and no layer by itself"
            )
        if type(weight.data) not in (Tensor, FakeTensor):  # a rehearsal runs on fakes: shapes without numbers
            raise UnsupportedError(
                f"the weight of {type(module).__name__} is a {type(weight.data).__name__}; it cannot be read here"
            )
        return weight if dtype is None else weight.to(dtype)

    def rounded(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.to(self.dtype(module)).to(weight.dtype)

    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        for name, value in zip(self.names, (weight, bias), strict=True):
            if value is None:
                continue
            like = module._parameters.get(name)
            dtype = self.dtype(module) if like is None else like.dtype
            fresh = value.detach().to(dtype, memory_format=torch.contiguous_format, copy=True).contiguous()
            module.register_parameter(name, nn.Parameter(fresh, requires_grad=False))

    def keep(self, module: nn.Module) -> Kept:
        return {name: module._parameters.get(name) for name in self.names if name in module._parameters}

    def restore(self, module: nn.Module, kept: Kept) -> None:
        for name, parameter in kept.items():
            module.register_parameter(name, parameter)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self._main(module).dtype

    def device(self, module: nn.Module) -> torch.device:
        return self._main(module).device

    def _main(self, module: nn.Module) -> Tensor:
        weight = module._parameters.get(self.weight_name)
        return weight if weight is not None else module.get_parameter(self.bias_name)
