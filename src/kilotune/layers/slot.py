"""One adapter's part of one layer, and which adapters of a model are on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deltas import Delta
from .errors import AdapterError, MergeError, UnsupportedError
from .inputs import SharedInput
from .kernels.ways import Way
from .methods import Method, Shared, Site
from .stacks import delta_of

if TYPE_CHECKING:
    from .routing import Route

__all__ = ["BIAS", "ActiveState", "Merged", "Slot", "slot_key"]

BIAS = "bias"
# Which route the code that runs here is in, by model: of this thread, and of this coroutine where there are several.
_HERE: ContextVar[Mapping[ActiveState, object]] = ContextVar("kilotune_routes")
_TAKEN = frozenset(dir(nn.ModuleDict()))  # of an instance: those that __init__ sets as well


def slot_key(name: str) -> str:
    """An adapter's name as a key of ModuleDict, which allows no dots and no names of its own attributes."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if key in _TAKEN else key


@final
class ActiveState:
    """Which adapters of a model are on, and which way they run; one object, read by all its layers."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.disabled = False
        self.way = Way.PICKED
        self.routes: dict[
            object, tuple[Route, object]
        ] = {}  # by a key in _HERE: a route, and the key of the one around
        self.routed = False  # the last forward had a route

    @property
    def live(self) -> tuple[str, ...]:
        return () if self.disabled else self.active

    @contextmanager
    def running(self, route: Route) -> Iterator[None]:
        """Inside this context :meth:`route` is ``route``, in this thread and coroutine and those that it starts."""
        outside, key = _HERE.get({}), object()
        self.routes[key] = route, outside.get(self)
        _HERE.set({**outside, self: key})
        try:
            yield
        finally:
            del self.routes[key]
            _HERE.set(outside)

    def refuse_in_route(self, what: str, name: str | None = None) -> None:
        """Refuse to change what an open route runs: adapter ``name``, or (None) any adapter and the weights."""
        used = sorted({n for route, _ in list(self.routes.values()) for n in route.names})
        if self.routes and (name is None or name in used):
            raise AdapterError(
                f"cannot {what} while a route is open{f' that names {used}' if used else ''}, which would go on with "
                "something else; leave its context first"
            )

    def route(self) -> Route | None:
        """The route that this code is in; None where there is none, or adapters are disabled.

        A checkpoint's second forward may run in a thread of autograd's own, where the one route there is serves.
        """
        if not self.routes and self.routed:
            self._check_not_again()
        if not self.routes or self.disabled:
            return None
        found: Route | None = self._route_here()
        return found

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler cannot tell threads: such layers run plain
    def _route_here(self) -> Route | None:
        self.routed = True
        key = _HERE.get({}).get(self)
        if key is not None:
            if key not in self.routes:
                raise UnsupportedError(
                    "route(): the route in which this coroutine was started has ended; wait for it inside the context"
                )
            return self.routes[key][0]
        if not isinstance(threading.current_thread(), threading._DummyThread):
            return None
        around = {outer for _, outer in self.routes.values()}
        inner = [found for key, (found, _) in self.routes.items() if key not in around]
        if len(inner) > 1:
            raise UnsupportedError(
                "route(): a backward runs in a thread of autograd's own while several threads have routes, so its "
                "rows cannot be told; run one training step at a time"
            )
        return next(iter(inner), None)

    def _check_not_again(self) -> None:
        """Refuse to run a routed forward a second time without its route, as a checkpoint does in the backward."""
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedError(
                "route(): gradient checkpointing runs the forward again in the backward, which is outside of the "
                "route; call backward() inside the context: with model.route(names): model(...).loss.backward()"
            )
        self.routed = False

    def __getstate__(self) -> dict[str, Any]:
        if self.disabled:  # the copy would be disabled for good, its weights those of the moment
            raise MergeError("cannot copy or save a model inside disable_adapter(); leave its context first")
        return {**self.__dict__, "routes": {}}


@final
class Slot(nn.Module):
    """One adapter's part of one layer: its trained parameters, and the method that reads them.

    ``method`` is None where only the bias is trained. The trained bias is kept as the bias's full value,
    as PEFT writes it; its delta is the difference to the base's. ``inputs``: with whom the layer may share the
    product of its input and the first factor, and its place there. ``dropper``: what drops from an input, in place of
    torch's dropout, where it is to draw from streams of its own.
    """

    def __init__(self, site: Site, method: Method[Any] | None, shared: Shared, params: Mapping[str, nn.Parameter]):
        super().__init__()
        self.site, self.method, self.shared = site, method, shared
        self.inputs: tuple[SharedInput, int] | None = None
        self.dropper: Callable[[Tensor], Tensor] | None = None
        for name, parameter in params.items():
            self.register_parameter(name, parameter)

    @property
    def trained_bias(self) -> Tensor | None:
        return self._parameters.get(BIAS)

    def own(self) -> dict[str, nn.Parameter]:
        """The method's parameters, without the trained bias."""
        return {name: p for name, p in self._parameters.items() if name != BIAS and p is not None}

    def delta(self) -> Delta | None:
        return None if self.method is None else delta_of(self.method, self.site, self.own(), self.shared)

    def first_product(self, x: Tensor, a: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Z = a x as ``make`` computes it, or as it was made for another layer with the same input and ``a``."""
        if self.inputs is None:
            return make()
        shared, place = self.inputs
        return shared.z(place, x, a, make)

    @property
    def drops(self) -> bool:
        """Whether there is dropout on the adapter's input now."""
        return self.training and self.method is not None and self.method.config.dropout > 0.0

    def drop(self, x: Tensor) -> Tensor:
        if not self.drops or self.method is None:
            return x
        return F.dropout(x, self.method.config.dropout, training=True) if self.dropper is None else self.dropper(x)


@final
@dataclass(frozen=True)
class Merged:
    """What merging one layer would write: weight and bias (None: unchanged), and the rounding error.

    ``lost``: the norm of the part of the change that is rounded away when the weight is stored, over the
    change's. ``error``: the norm of the difference of the stored weight and the wanted one, over the wanted one's.
    """

    weight: Tensor | None
    bias: Tensor | None
    lost: float
    error: float
