"""What a base model is lent while adapters are in it, so that it answers other libraries right; taken back by
``unload()``.

A value that is lent hides the class's own attribute of that name, on this one object.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .added import Added

__all__ = ["lend", "lend_module", "take_back"]

LENT = "_kilotune_lent"  # name -> [what the object had of its own before], or [] where it had nothing


def lend(base: nn.Module, name: str, value: Any) -> None:
    """Let ``base`` answer ``name`` with ``value``: no module and no tensor. A hook's handle lets the hook be taken."""
    own = base.__dict__
    own.setdefault(LENT, {}).setdefault(name, [own[name]] if name in own else [])
    own[name] = value


def lend_module(base: nn.Module, name: str, module: Added) -> None:
    """Hang ``module`` into ``base``, where nothing is called so, so that its parameters are among the base's."""
    base.__dict__.setdefault(LENT, {})[name] = []
    base._modules[name] = module


def take_back(base: nn.Module) -> None:
    """Leave ``base`` as it was before anything was lent."""
    for name, before in base.__dict__.pop(LENT, {}).items():
        base._modules.pop(name, None)
        value = base.__dict__.pop(name, None)
        if isinstance(value, RemovableHandle):
            value.remove()
        if before:
            base.__dict__[name] = before[0]
