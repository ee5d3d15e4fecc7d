"""The first forward with gradients is watched: a layer whose adapter had no part in it is told of, once.

It ends where the base model's own forward ends, which two hooks tell; they are gone then. Where only parts of the model
are called (``model.encode_image(x)``), it ends with the first backward. The hooks hold nothing, and go with copies of
the model.
"""

from __future__ import annotations

import re
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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
    state.watch = None
    if not state.watched.issuperset(state.active):
        base.register_forward_pre_hook(_begin)
        base.register_forward_hook(_end)
        state.watch = _Watch(base)


def unwatch(base: nn.Module) -> None:
    """Take the hooks away."""
    for hooks, own in ((base._forward_pre_hooks, _begin), (base._forward_hooks, _end)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]


@final
class _Watch:
    """Who has acted, until the forward ends that is watched."""

    def __init__(self, base: nn.Module) -> None:
        self._base = weakref.ref(base)
        self._seen: set[str] = set()
        self._thread: int | None = None  # in which the base's forward runs
        self._awaited: RemovableHandle | None = None

    def ran(self, slots: Sequence[Slot]) -> None:
        """``slots`` have acted."""
        self._seen.update([slot.site.name for slot in slots])
        if self._thread is None and self._awaited is None and torch.is_grad_enabled():
            held = (p for slot in slots if slot.training for p in slot.parameters() if p.requires_grad)
            if torch._C._current_graph_task_id() == -1 and (parameter := next(held, None)) is not None:
                self._awaited = parameter.register_hook(self._backward)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """The base's forward begins."""
        if self._thread in (None, threading.get_ident()):
            self._seen, self._thread = set(), threading.get_ident()

    def end(self) -> None:
        """The base's forward is over, if it is the one that is watched."""
        if self._thread == threading.get_ident():
            self._tell()

    def _backward(self, gradient: Tensor) -> None:
        if self._awaited is not None:
            self._awaited.remove()
            torch.autograd.Variable._execution_engine.queue_callback(self._tell)

    def _tell(self) -> None:
        base = self._base()
        layers = [] if base is None else list(_layers(base))
        if base is None or not layers or layers[0].state.watch is not self:
            return
        state = layers[0].state
        state.watch = None
        state.watched.update(state.active)
        unwatch(base)
        if any(map(_compiled, base_modules(base))):  # what runs in there is not seen
            return
        trained = dict.fromkeys(slot.site.name for layer in layers for slot in _trained(layer))
        if unused := [name for name in trained if name not in self._seen]:
            warnings.warn(_text(unused, len(trained), state.active), UnusedLayersWarning, stacklevel=3)


def _begin(base: nn.Module, args: Any) -> None:
    layers = [] if torch.compiler.is_compiling() or not (base.training and torch.is_grad_enabled()) else _layers(base)
    state = next((layer.state for layer in layers if _trained(layer)), None)
    if state is not None and state.now().route is None:
        if state.watch is None:  # in a copy of the model
            state.watch = _Watch(base)
        state.watch.begin()


def _end(base: nn.Module, args: Any, output: Any) -> None:
    layer = None if torch.compiler.is_compiling() else next(_layers(base), None)
    if layer is not None and layer.state.watch is not None:
        layer.state.watch.end()


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
