"""The first forward with gradients is watched: a layer whose adapter had no part in it is told of, once.

Two hooks on the base model wait for that forward and are gone after it. They stand in the model only until then, hold
nothing, and go with copies of it.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any, final

import torch
from torch import nn

from ..added_modules import base_modules
from ..layers.active_adapters import ActiveState
from ..layers.adapted import AdaptedLayer
from ..layers.slot import Slot

__all__ = ["UnusedLayersWarning", "unwatch", "watch"]

SHOWN = 5


@final
class UnusedLayersWarning(UserWarning):
    """Layers have an active adapter, and the first forward with gradients neither ran them nor read their weights."""


def watch(base: nn.Module, state: ActiveState) -> None:
    """Watch the next forward with gradients, if adapters are active of which none was watched yet."""
    unwatch(base)
    if not state.watched.issuperset(state.active):
        base.register_forward_pre_hook(_begin)
        base.register_forward_hook(_end)


def unwatch(base: nn.Module) -> None:
    """Take the hooks away."""
    for hooks, own in ((base._forward_pre_hooks, _begin), (base._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]


def _begin(base: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling() or not (base.training and torch.is_grad_enabled()):
        return
    layers = list(_layers(base))
    if any(map(_compiled, base_modules(base))):  # what runs in there is not seen
        unwatch(base)
        return
    state = layers[0].state if layers else None
    if state is not None and state.seen is None and state.now().route is None and any(map(_trained, layers)):
        state.seen, state.watcher = set(), threading.get_ident()


def _end(base: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    layers = list(_layers(base))
    state = layers[0].state if layers else None
    if state is None or state.seen is None or state.watcher != threading.get_ident():
        return
    seen, state.seen = state.seen, None
    state.watched.update(state.active)
    unwatch(base)
    trained = dict.fromkeys(slot.site.name for layer in layers for slot in _trained(layer))
    unused = [name for name in trained if name not in seen]
    if unused:
        warnings.warn(_text(unused, len(trained), state.active), UnusedLayersWarning, stacklevel=2)


def _layers(base: nn.Module) -> Iterator[AdaptedLayer]:
    return (module for module in base_modules(base) if isinstance(module, AdaptedLayer))


def _trained(layer: AdaptedLayer) -> list[Slot]:
    """The layer's live slots that train something."""
    found = []
    for name in layer.state.now().live:
        slot = None if name in layer.merged else layer.slot(name)
        if slot is None:
            continue
        shared = slot.shared.trained.values() if slot.method is not None else ()
        if any(parameter.requires_grad for parameter in (*slot.parameters(), *shared)):
            found.append(slot)
    return found


def _compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _text(unused: list[str], count: int, active: tuple[str, ...]) -> str:
    alike: dict[str, list[str]] = {}
    for name in unused:
        alike.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    shown = [f"{names[0]!r}" + (f" and {len(names) - 1} more of {kind!r}" if names[1:] else "")
             for kind, names in list(alike.items())[:SHOWN]]  # fmt: skip
    more = f" and {len(alike) - SHOWN} kinds more" if len(alike) > SHOWN else ""
    return (
        f"{len(unused)} of {count} layers with the adapters {list(active)} had no part in the first forward with "
        f"gradients: {', '.join(shown)}{more}. It neither ran them nor read their weights, so nothing is trained "
        "there. That is as it should be for experts that got no token, blocks that were dropped and branches that this "
        "input did not take. Else the model comes to these weights in another way, which no adapter reaches, or does "
        "not use them: leave such layers out with exclude_modules"
    )
