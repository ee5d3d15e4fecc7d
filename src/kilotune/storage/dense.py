"""Plain floating-point parameters."""

from __future__ import annotations

from typing import ClassVar, cast, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor  # `import torch` has loaded it

from ..errors import UnsupportedError
from ._base import Kept, Storage, put_parameter
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
        if any(_computed(module, name) for name in names):
            return False  # nothing here to write to
        held = [module._parameters.get(name) for name in names]
        present = [p for p in held if p is not None]
        return bool(present) and all(p.dtype in FLOATS and (type(p.data) is Tensor or is_sharded(p)) for p in present)

    def read(self, module: nn.Module, kept: Kept | None = None, dtype: torch.dtype | None = None) -> Tensor:
        held = None if kept is None else kept.get(self.weight_name)
        _check_own(module, self.weight_name)
        weight = getattr(module, self.weight_name) if held is None else held
        if is_sharded(weight):
            raise UnsupportedError(
                f"the weight of a {type(module).__name__} {SHARDED}; shard the blocks, and no layer by itself"
            )
        if type(weight.data) not in (Tensor, FakeTensor):  # a rehearsal runs on fakes: shapes without numbers
            raise UnsupportedError(
                f"the weight of {type(module).__name__} is a {type(weight.data).__name__}; it cannot be read here"
            )
        return weight if dtype is None else weight.to(dtype)

    def read_bias(self, module: nn.Module, kept: Kept | None = None) -> Tensor | None:
        if _computed(module, self.bias_name):
            return cast(Tensor, getattr(module, self.bias_name))
        return super().read_bias(module, kept)

    def rounded(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight.to(self.dtype(module)).to(weight.dtype)

    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        for name, value in zip(self.names, (weight, bias), strict=True):
            if value is None:
                continue
            _check_own(module, name)
            like = module._parameters.get(name)
            dtype = self.dtype(module) if like is None else like.dtype
            fresh = value.detach().to(dtype, memory_format=torch.contiguous_format, copy=True).contiguous()
            put_parameter(module, name, nn.Parameter(fresh, requires_grad=False))

    def keep(self, module: nn.Module) -> Kept:
        return {name: module._parameters.get(name) for name in self.names if name in module._parameters}

    def restore(self, module: nn.Module, kept: Kept) -> None:
        for name, parameter in kept.items():
            put_parameter(module, name, parameter)

    def dtype(self, module: nn.Module) -> torch.dtype:
        return self._main(module).dtype

    def device(self, module: nn.Module) -> torch.device:
        return self._main(module).device

    def _main(self, module: nn.Module) -> Tensor:
        weight = module._parameters.get(self.weight_name)
        if weight is not None:
            return weight
        # After the weight: where there is none, the bias; where it is computed by now, what is computed.
        names = [name for name in self.names if isinstance(getattr(module, name, None), Tensor)]
        return cast(Tensor, getattr(module, names[0]))


def _computed(module: nn.Module, name: str) -> bool:
    """Whether a weight is made from other parameters: weight norm, pruning, torch.nn.utils.parametrize."""
    return name not in module._parameters and isinstance(getattr(module, name, None), Tensor)


def _check_own(module: nn.Module, name: str) -> None:
    """Refuse a weight that has come to be computed since the adapter was put on."""
    if _computed(module, name):
        raise UnsupportedError(
            f"the {name} of a {type(module).__name__} is computed from other parameters now (weight norm, pruning or "
            "another parametrisation, put on after the adapter), so it cannot be read or merged into; take that off "
            "(remove_parametrizations(), prune.remove(), remove_weight_norm()), or unload() the adapter first"
        )
