"""One z = A x for all layers that are fed by the same tensor: q, k and v of attention; gate and up of a feed-forward.

Which layers may share is settled when the adapter is added (:func:`join`): those of one parent module whose first
factor is the same frozen matrix. Whether they do share is seen at each call: the input must be the same tensor object,
unchanged since z was made, in the same thread and under the same gradient and autocast modes, and each layer takes a
z at most once, so that a layer that is called twice gets a new one. What autograd cannot notice (a write through
``.data``, or by other code into the same memory) is not noticed here either.

Under torch.compile nothing is kept: the compiler finds equal products itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, final

import torch
from torch import Tensor

from .kernels.lowrank import autocast_dtype

__all__ = ["SharedInput", "join"]


@final
class _Made:
    """A z, what it was made of, and who has had it."""

    def __init__(self, z: Tensor, a: Tensor, source: weakref.ref[Tensor], state: tuple[Any, ...], member: int) -> None:
        self.z, self.source, self.state, self.served = z, source, state, {member}
        self.a = a  # held, so that no other tensor can come to stand where it stood


@final
class _Kept:
    """The last z of one thread."""

    def __init__(self) -> None:
        self.made: _Made | None = None

    def forget(self, found: _Made) -> None:
        """The input is gone, and nobody can ask for its z again: free it."""
        if self.made is found:
            self.made = None


@final
class SharedInput:
    """The layers that may share one z; made by :func:`join`.

    Args:
        outs: the number of outputs of each member.

    """

    def __init__(self, outs: tuple[int, ...]) -> None:
        self.outs = outs
        self._threads = threading.local()

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
            make: computes z (..., r).

        """
        state = _state(x, a)
        if state is None:
            return make()
        try:
            kept: _Kept = self._threads.kept
        except AttributeError:
            kept = self._threads.kept = _Kept()
        made = kept.made
        if made is not None and made.source() is x and made.state == state and member not in made.served:
            made.served.add(member)
            if len(made.served) == len(self.outs):
                kept.made = None
            return made.z
        kept.made = None
        z = make()
        found = _Made(z, a, weakref.ref(x, lambda _: kept.forget(found)), state, member)
        kept.made = found
        return z

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        return SharedInput(self.outs)

    def __reduce__(self) -> tuple[type[SharedInput], tuple[tuple[int, ...]]]:
        return SharedInput, (self.outs,)


def _state(x: Tensor, a: Tensor) -> tuple[Any, ...] | None:
    """All that z depends on beside the object x; None where it cannot be told, and nothing is shared."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return None
    if type(x) is not Tensor or x.is_inference() or torch._C._are_functorch_transforms_active():
        return None
    grad = (torch.is_grad_enabled(), x.requires_grad, x.is_leaf)
    return (x._version, *grad, autocast_dtype(x.device), *_place(x), *_place(a))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's numbers are, and in what form."""
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def join(layers: Iterable[tuple[str, int, Hashable]]) -> dict[str, tuple[SharedInput, int]]:
    """Which of the layers may share a z: {name: (the shared object, the layer's place in it)}.

    Args:
        layers: (dotted name, outputs, what the first factor is); layers of one parent whose last is equal share.

    """
    groups: dict[Hashable, list[tuple[str, int]]] = {}
    for name, out, first in layers:
        groups.setdefault((name.rpartition(".")[0], first), []).append((name, out))
    found = {}
    for members in groups.values():
        if len(members) > 1:
            shared = SharedInput(tuple(out for _, out in members))
            found.update({name: (shared, place) for place, (name, _) in enumerate(members)})
    return found
