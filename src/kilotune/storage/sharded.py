"""Weights of which each process holds a part (FSDP2's ``fully_shard``), told without importing torch.distributed.

A sharded weight is whole only while the block around its layer runs. Everywhere else it is gathered, by all processes
at once, or not read at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["SHARDED", "gathered", "is_sharded", "is_unit", "processes", "whole", "whole_copy", "whole_parts"]

SHARDED = "is sharded over processes, so it can be read only while the block around its layer runs"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of ``tensor`` only: a DTensor."""
    return type(tensor).__name__ == "DTensor"


def is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def processes() -> int:
    """How many processes train together now."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` with all its parts; where it is sharded, all processes have to call this."""
    return cast(Tensor, cast(Any, tensor).full_tensor().detach()) if is_sharded(tensor) else tensor


def whole_parts(held: Mapping[str, nn.Parameter | None]) -> dict[str, nn.Parameter | None]:
    """Parameters by name, whole; where they are sharded, all processes have to call this."""
    return {
        name: nn.Parameter(whole(p), requires_grad=False) if p is not None and is_sharded(p) else p
        for name, p in held.items()
    }


def whole_copy(module: nn.Module) -> nn.Module:
    """Replace what is sharded of ``module``, a copy that no ``fully_shard`` knows of, by the whole; gives it back."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and is_sharded(parameter):
                inner._parameters[name] = nn.Parameter(whole(parameter).clone(), requires_grad=False)
    return module


@contextmanager
def gathered(modules: Iterable[nn.Module], values: Mapping[int, Tensor] | None = None) -> Iterator[None]:
    """Inside, the parameters of ``modules`` are whole, for reading; all processes have to enter.

    Args:
        modules: each with its own parameters only.
        values: what they are, by ``id`` of the parameter, where somebody has gathered them already.

    """
    known, kept = values or {}, []
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and (id(parameter) in known or is_sharded(parameter)):
                    value = known[id(parameter)] if id(parameter) in known else whole(parameter)
                    kept.append((module, name, parameter))
                    module._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
        yield
    finally:
        for module, name, parameter in reversed(kept):
            module._parameters[name] = parameter
