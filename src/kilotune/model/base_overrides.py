"""What a base model answers other libraries while adapters are in it; ``unload()`` takes all of it away again.

An override hides the class's own attribute of that name, on this one object.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..added_modules import Added, base_modules

__all__ = ["attach_module", "override", "remove_overrides", "restore"]

OVERRIDES = "_kilotune_overrides"  # name -> [what the object had of its own before], or [] where it had nothing


def override(base: nn.Module, name: str, value: Any) -> None:
    """Let ``base`` answer ``name`` with ``value``: no module and no tensor. A hook's handle lets the hook be taken."""
    own = base.__dict__
    own.setdefault(OVERRIDES, {}).setdefault(name, [own[name]] if name in own else [])
    own[name] = value


def attach_module(base: nn.Module, name: str, module: Added) -> None:
    """Hang ``module`` into ``base``, where nothing is called so, so that its parameters are among the base's."""
    base.__dict__.setdefault(OVERRIDES, {})[name] = []
    base._modules[name] = module


def restore(base: nn.Module, name: str) -> None:
    """Let ``base`` answer ``name`` as it did before that was overridden, if it was."""
    overridden = base.__dict__.get(OVERRIDES, {})
    if name not in overridden:
        return
    before = overridden.pop(name)
    base._modules.pop(name, None)
    value = base.__dict__.pop(name, None)
    if isinstance(value, RemovableHandle):
        value.remove()
    if before:
        base.__dict__[name] = before[0]
    if not overridden:
        del base.__dict__[OVERRIDES]


def remove_overrides(base: nn.Module) -> None:
    """Leave ``base`` and what is in it as it was before anything was overridden."""
    for module in list(base_modules(base)):
        for name in list(module.__dict__.get(OVERRIDES, ())):
            restore(module, name)
