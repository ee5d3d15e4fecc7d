"""Which adapters of a model are on, which way they run, and which route the code that runs now is in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch

from ..errors import AdapterError, MergeError, UnsupportedError
from ..kernels.ways import Way
from .route import Route

__all__ = ["ActiveState"]

# Which route the code that runs here is in, by model: of this thread, and of this coroutine where there are several.
_HERE: ContextVar[Mapping[ActiveState, object]] = ContextVar("kilotune_routes")


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
        # A forward that is watched (model/unused_layers.py): the layers whose adapters acted, and the thread.
        self.seen: set[str] | None = None
        self.watcher = 0
        self.watched: set[str] = set()  # adapters whose first forward with gradients has been watched

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
        return {**self.__dict__, "routes": {}, "seen": None, "watched": set(self.watched)}
