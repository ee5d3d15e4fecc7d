"""One z = A x for all layers that are fed by the same tensor: q, k and v of attention; gate and up of a feed-forward.

Which layers may share is settled when the adapter is added (:func:`join`): those of one parent module whose first
factor is the same frozen matrix. Whether they do share is seen at each call. A layer takes a z only where making its
own would give the same bits and a graph that serves as well:

- the input is the same tensor object, with the same memory, version, shape and place in the graph;
- so is the matrix;
- thread, stream, gradient mode, autocast and everybody who watches operations (a checkpoint's hooks on what autograd
  keeps, tracers) are the same, so that what a checkpoint makes again is what was made at first;
- no backward has run through z, which may have freed its graph;
- the layer has not taken this z before: one that is called twice gets a new one.

Everywhere else, and wherever that cannot be told, each layer makes its own z. Under torch.compile nothing is kept: in a
training step the compiler finds equal products itself (without gradients torch 2.13's does not look for them). One z is
held at a time, for each adapter and thread, and none for longer than its input lives.

What autograd cannot notice is not noticed here either: a write into the input's memory through ``x.data``,
``x.untyped_storage()``, a piece of ``unsafe_chunk``, or by code outside of torch, between the calls of two layers of
one parent. Memory that numpy reads or writes is left out for that reason.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # `import torch` has loaded it

from ..kernels.lowrank import autocast_dtype

__all__ = ["SharedInput", "join"]

# The hooks in whose hands autograd gives what it keeps; torch can be asked for them since 2.8.
_top_hooks: Callable[[bool], tuple[Any, Any] | None] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)
# What the projections after attention and feed-forward are called: they stand beside those before, often with the same
# shape, and read something else. Leaving a layer out costs a product at most; counting it in misleads the cost model.
OUTPUTS = frozenset({"o_proj", "out_proj", "c_proj", "down_proj", "wo", "w2", "fc2", "fc_out", "out_lin", "to_out"})
ONE_QUEUE = ("cpu", "meta", "mps")  # devices that do all work in the order in which it is asked for


@final
class _Made:
    """A z, what it was made of, and who has had it."""

    def __init__(
        self, group: SharedInput, member: int, z: Tensor, a: Tensor, memory: torch.UntypedStorage, state: _State
    ) -> None:
        self.group, self.served, self.z, self.state = group, {member}, z, state
        self.held = a, memory  # so that nothing else can come to stand where they stood
        self.source: weakref.ref[Tensor] | None = None
        self.spent = False
        if z.requires_grad:
            z.register_hook(partial(_spend, weakref.ref(self)))  # type: ignore[no-untyped-call]

    def serves(self, group: SharedInput, member: int, x: Tensor, state: _State) -> bool:
        """Whether ``member`` may have this z."""
        same = self.group is group and self.source is not None and self.source() is x
        return same and not self.spent and member not in self.served and self.state.equals(state)


@final
class _Kept:
    """The last z of one thread."""

    def __init__(self) -> None:
        self.made: _Made | None = None
        self._forget = partial(_forget, weakref.ref(self))  # weakly: no cycle that would keep z until it is collected

    def keep(self, made: _Made, x: Tensor) -> None:
        """Keep ``made`` for as long as ``x`` lives."""
        made.source = weakref.ref(x, self._forget)
        self.made = made


def _forget(kept: weakref.ref[_Kept], source: weakref.ref[Tensor]) -> None:
    """The input is gone, in whatever thread, and nobody can ask for its z again: free it."""
    there = kept()
    made = None if there is None else there.made
    if there is not None and made is not None and made.source is source:
        there.made = None


def _spend(made: weakref.ref[_Made], gradient: Tensor | None) -> None:
    """A backward runs through z, and may free its graph."""
    there = made()
    if there is not None:
        there.spent = True


@final
class _Last(threading.local):
    """The last z of each thread, of all groups of one adapter. A copy of it is empty."""

    def __init__(self) -> None:
        self.kept = _Kept()

    def __reduce__(self) -> tuple[type[_Last], tuple[()]]:
        return _Last, ()


@final
class SharedInput:
    """The layers that may share one z; made by :func:`join`.

    Args:
        outs: the number of outputs of each member.
        last: where the last z is, which groups may have in common; by default a place of its own.

    """

    def __init__(self, outs: tuple[int, ...], last: _Last | None = None) -> None:
        self.outs = outs
        self._last = _Last() if last is None else last

    @property
    def mean_out(self) -> float:
        """The mean number of outputs of the members."""
        return sum(self.outs) / len(self.outs)

    def z(self, member: int, x: Tensor, a: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` gives, or gave another member for the very same ``x`` and ``a``.

        Args:
            member: which of the layers asks, 0 ... len(outs) - 1.
            x: the input (..., in).
            a: the first factor (r, in).
            make: computes z (..., r) of nothing but ``x`` and ``a``.

        """
        if not _tellable(x, a) or (state := _state_of(x, a)) is None:
            return make()
        kept = self._last.kept
        made = kept.made
        if made is not None and made.serves(self, member, x, state):
            made.served.add(member)
            if len(made.served) == len(self.outs):
                kept.made = None
            return made.z
        kept.made = made = None  # freed before the next one is made
        z = make()
        kept.keep(_Made(self, member, z, a, x.untyped_storage(), state), x)
        return z

    def __reduce__(self) -> tuple[type[SharedInput], tuple[tuple[int, ...], _Last]]:
        return SharedInput, (self.outs, self._last)


@final
class _State:
    """All that z depends on beside the object x.

    values: what is compared. watchers: who watches, compared as objects, and held weakly: a checkpoint's hook holds
    its input.
    """

    __slots__ = ("values", "watchers")

    def __init__(self, values: tuple[Any, ...], watchers: tuple[weakref.ref[Any], ...]) -> None:
        self.values, self.watchers = values, watchers

    def equals(self, other: _State) -> bool:
        if self.values != other.values or len(self.watchers) != len(other.watchers):
            return False
        return not self.watchers or all(
            one() is two() is not None for one, two in zip(self.watchers, other.watchers, strict=True)
        )


def _tellable(x: Tensor, a: Tensor) -> bool:
    """Whether a change of ``x`` would show."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, FakeTensor) or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if x.layout is not torch.strided or x.is_nested or x.is_inference() or a.is_inference():
        return False
    return x.untyped_storage().resizable()  # no: the memory is somebody else's, or shown to numpy


def _state_of(x: Tensor, a: Tensor) -> _State | None:
    """What z depends on now; None where it cannot be told."""
    device, recording = x.device, torch.is_grad_enabled()
    stream: object = None
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # what runs again and again sees other values each time
            return None
        stream = torch.cuda.current_stream(device)
    elif device.type not in ONE_QUEUE:
        return None
    found: list[object] = []
    if recording:
        if _top_hooks is None:
            return None
        if (hooks := _top_hooks(True)) is not None:
            found.append(hooks[0])
    if count := torch._C._len_torch_dispatch_stack():
        found.append(torch._C._get_dispatch_stack_at(count - 1))
    if count := torch._C._len_torch_function_stack():
        found.append(torch._C._get_function_stack_at(count - 1))
    try:
        watchers = tuple(map(weakref.ref, found)) if found else ()
    except TypeError:  # one that cannot be held weakly
        return None
    modes = (torch.is_inference_mode_enabled(), autocast_dtype(device), stream)
    graph = (x.requires_grad, x.is_leaf) if recording else None  # asking a view is_leaf may write its graph anew
    return _State((modes, graph, _place(x), _place(a)), watchers)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers are, in what form, and how often they were changed."""
    # A fake has no numbers, and torch objects to being asked where they are.
    fake = isinstance(tensor, FakeTensor)
    start = (tensor.untyped_storage()._cdata, tensor.storage_offset()) if fake else tensor.data_ptr()
    return start, tensor._version, tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def join(layers: Iterable[tuple[str, int, Hashable]]) -> dict[str, tuple[SharedInput, int]]:
    """Which layers of one adapter may share a z: {name: (the shared object, the layer's place in it)}.

    Args:
        layers: (dotted name, outputs, what the first factor is); layers of one parent whose last is equal share.

    """
    groups: dict[Hashable, list[tuple[str, int]]] = {}
    for name, out, first in layers:
        parent, _, own = name.rpartition(".")
        if own not in OUTPUTS:
            groups.setdefault((parent, first), []).append((name, out))
    found, last = {}, _Last()
    for members in groups.values():
        if len(members) > 1:
            shared = SharedInput(tuple(out for _, out in members), last)
            found.update({name: (shared, place) for place, (name, _) in enumerate(members)})
    return found
