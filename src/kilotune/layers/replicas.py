"""What ``nn.DataParallel`` makes of a wrapper: shallow copies for one forward, each run in a new thread.

A copy runs what the code ran that had it made, in the backward too, whatever that thread is in. torch takes the
parameters out of a copy's modules and leaves them as attributes, which its first use undoes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .active_adapters import ActiveState
from .slot import Slot, weakly

__all__ = ["settle", "with_parameters"]


def with_parameters(replica: nn.Module, state: ActiveState) -> nn.Module:
    """Let a copy of one wrapper run what ``state`` says here and now, and have parameters when it first does.

    Args:
        replica: the copy, whose modules torch has still to copy.
        state: the original's.

    """
    replica.__dict__.update(_state=state.inherited(), _unsettled=True, forward=partial(_first_forward, replica))
    return replica


def settle(replica: nn.Module) -> None:
    """Give a copy its parameters, which before its first forward, or the first read of one, are attributes."""
    replica.__dict__["_unsettled"] = False
    for module in replica.modules():
        for name, tensor in module.__dict__.get("_former_parameters", {}).items():
            # A frozen one is a parameter as it was; a trained one has a graph, which leads to the original.
            held = tensor if tensor.requires_grad else nn.Parameter(tensor, requires_grad=False)
            module._parameters[name] = held
            module.__dict__.pop(name, None)
        if isinstance(module, Slot):
            module.site = weakly(module.site, replica)


def _first_forward(replica: nn.Module, *args: Any, **kwargs: Any) -> Any:
    del replica.__dict__["forward"]
    if replica.__dict__["_unsettled"]:
        settle(replica)
    return replica.forward(*args, **kwargs)
