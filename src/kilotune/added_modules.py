"""What adapters add to a model, held apart, so that who looks at the base model's modules can pass it over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

from torch import nn

__all__ = ["Added", "base_modules", "named_base_modules"]


@final
class Added(nn.ModuleDict):
    """What adapters have added to one module, by the adapter's key. Its size grows with the number of adapters."""


def named_base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``root.named_modules()`` without what is :class:`Added`: as quick with a thousand adapters as with one."""
    seen: set[int] = set()
    left = [("", root)]
    while left:
        name, module = left.pop()
        if id(module) in seen or isinstance(module, Added):
            continue
        seen.add(id(module))
        yield name, module
        inner = [(f"{name}.{key}" if name else key, m) for key, m in module._modules.items() if m is not None]
        left += reversed(inner)


def base_modules(root: nn.Module) -> Iterator[nn.Module]:
    """``root.modules()`` without what is :class:`Added`."""
    return (module for _, module in named_base_modules(root))
