"""Which adapters of a model are on, and what the code that runs now is in: a route, or ``disable_adapter()``.

::

    ActiveState            one for a model, read by all its layers
      adapters             which are active and merged: for all threads
      _HERE ── _Place      the route or disable_adapter() around this code: of its thread, and of its coroutine
      history              what ran in a forward, for gradient checkpointing (replay.py)
    Running                what follows of all that for a layer that runs now
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeVar, final

import torch

from ..errors import AdapterError, MergeError, UnsupportedError
from ..kernels.ways import Way
from .replay import Asker, History, asker, recorded
from .route import Route
from .slot import Slot

__all__ = ["ActiveState", "Running"]


Function = TypeVar("Function", bound=Callable[..., Any])


def _not_compiled(function: Function) -> Function:
    """``function``, which a compiler does not look into: it cannot tell threads."""
    disabled: Function = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


COROUTINE = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Adapters(NamedTuple):
    """What is the same in all threads. removed: how many active ones have been: another may come to bear the name."""

    active: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    removed: int = 0


@final
class _Place:
    """A ``with`` block that says what runs in it, with what those around it say."""

    def __init__(self, route: Route | None, disabled: bool, outer: _Place | None) -> None:
        self.route, self.disabled, self.outer = route, disabled, outer
        self.asker, self.recorded = asker(), recorded()
        self.owner, self.in_coroutine = _who(), disabled and _in_coroutine()
        self.open = True
        self._running: Running | None = None

    def running(self, adapters: Adapters) -> Running:
        if self._running is None or self._running.ran.adapters is not adapters:
            self._running = _running(adapters, self)
        return self._running

    def close(self) -> None:
        self.open, self.route, self._running = False, None, None


class Ran(NamedTuple):
    """What a forward ran with, in a form that can be kept."""

    adapters: Adapters
    place: _Place | None = None


class Running(NamedTuple):
    """What a layer runs with: the ``route``, or the adapters that are ``live``; neither where they are ``disabled``."""

    live: tuple[str, ...]
    route: Route | None
    disabled: bool
    ran: Ran


def _running(adapters: Adapters, place: _Place | None = None) -> Running:
    if place is None:
        return Running(adapters.active, None, False, Ran(adapters))
    if place.disabled:
        return Running((), None, True, Ran(adapters, place))
    return Running(adapters.active, place.route, False, Ran(adapters, place))


def _who() -> tuple[int, int]:
    """The thread and the coroutine that run now."""
    try:
        return threading.get_ident(), id(asyncio.current_task())
    except RuntimeError:  # none
        return threading.get_ident(), 0


def _in_coroutine() -> bool:
    """Whether this thread may run something else before this function returns."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_flags & COROUTINE:
            return True
        frame = frame.f_back
    return False


_HERE: ContextVar[Mapping[ActiveState, _Place]] = ContextVar("kilotune_places")


class Watch(Protocol):
    """Who wants to know which layers' adapters act: model/unused_layers.py."""

    def ran(self, slots: Sequence[Slot]) -> None:
        """These have acted."""

    def begin(self) -> None:
        """The base model's forward begins."""

    def end(self) -> None:
        """It is over."""


@final
class ActiveState:
    """Which adapters of a model are on, and which way they run; one object, read by all its layers."""

    def __init__(self) -> None:
        self.adapters = Adapters()
        self.way = Way.PICKED
        self.opened: dict[_Place, None] = {}  # in all threads
        self.history: History[Ran] = History()
        self._everywhere = _running(self.adapters)  # outside of all places
        self._nowhere = Running((), None, True, Ran(self.adapters))
        self._replica: _Replica | None = None
        self._changed_by: Asker | None = None
        self._thread = threading.local()  # .disabled: what a compiler can ask for
        self.watch: Watch | None = None  # until the first forward with gradients is over
        self.watched: set[str] = set()  # the adapters of which that is so
        self.switched_off: tuple[str, ...] | None = None  # those that are active again when all are switched on

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the active adapters, whether they are disabled here or not."""
        return self.adapters.active

    @property
    def merged(self) -> tuple[str, ...]:
        """The names of the adapters that are in the weights."""
        return self.adapters.merged

    @_not_compiled
    def change(
        self, active: tuple[str, ...] | None = None, merged: tuple[str, ...] | None = None, removed: str | None = None
    ) -> None:
        """Other adapters are active or merged from now on, in all threads.

        Args:
            active: those that are.
            merged: likewise.
            removed: one that is in the model no more.

        Raises:
            UnsupportedError: in a forward that a checkpoint runs again, and may stop.

        """
        if asker() is not None and recorded() is not False:
            raise UnsupportedError(
                "gradient checkpointing runs a forward again that itself changes which adapters are active or merged; "
                "torch may stop it midway, which would leave the wrong ones. Name them with model.route() there, or "
                "change them outside of the checkpoint, or take use_reentrant=True"
            )
        old = self.adapters
        self.adapters = Adapters(
            old.active if active is None else active,
            old.merged if merged is None else merged,
            old.removed + (removed in old.active),
        )
        self._everywhere = _running(self.adapters)
        self._changed_by = asker()
        self._note_change()

    # -- places ----------------------------------------------------------------------------------

    @contextmanager
    def running(self, route: Route) -> Iterator[None]:
        """Inside this context rows take ``route``, in this thread and coroutine and those that it starts."""
        with self._place(route, False):
            yield

    @contextmanager
    def disabling(self) -> Iterator[None]:
        """Inside this context the base runs alone, in this thread and coroutine and those that it starts."""
        with self._place(None, True):
            yield

    @contextmanager
    def _place(self, route: Route | None, disabled: bool) -> Iterator[None]:
        place = self._enter(route, disabled)
        try:
            yield
        finally:
            self._leave(place)

    @_not_compiled
    def _enter(self, route: Route | None, disabled: bool) -> _Place:
        before, asking = self._here(), asker()
        outer = before
        if asking is not None and (outer is None or outer.asker != asking):
            outer = self.history.ran(asking.number, self._at(outer).ran).place  # what is run again is where it was
        if outer is not None:
            route, disabled = outer.route if route is None else route, disabled or outer.disabled
        place = _Place(route, disabled, before)
        self.opened[place] = None
        self._go_to(place)
        return place

    @_not_compiled
    def _leave(self, place: _Place) -> None:
        del self.opened[place]
        place.close()
        if _HERE.get({}).get(self) is place:  # else it was left in another coroutine than it was entered in
            self._go_to(self._here())

    def _here(self) -> _Place | None:
        """The innermost place that is still open."""
        place = _HERE.get({}).get(self)
        while place is not None and not place.open:
            place = place.outer
        return place

    def _go_to(self, place: _Place | None) -> None:
        others = {state: there for state, there in _HERE.get({}).items() if state is not self}
        _HERE.set(others if place is None else {**others, self: place})
        # Compiled code asks the thread. It has to find out itself where coroutines of one thread take turns; and where
        # a thread does not say that it is disabled, because a context may have been handed to it.
        self._thread.disabled = place is not None and place.disabled and not place.in_coroutine
        self._note_change()

    def open_routes(self) -> list[Route]:
        """The routes that are open, in all threads."""
        return [place.route for place in list(self.opened) if place.route is not None]

    def refuse_in_route(self, what: str, name: str | None = None) -> None:
        """Refuse to change what an open route runs: adapter ``name``, or (None) any adapter and the weights."""
        routes = self.open_routes()
        used = sorted({n for route in routes for n in route.names})
        if routes and (name is None or name in used):
            raise AdapterError(
                f"cannot {what} while a route is open{f' that names {used}' if used else ''}, which would go on with "
                "something else; leave its context first"
            )

    def refuse_where_disabled(self, what: str) -> None:
        """Refuse to change the weights of a base that runs alone."""
        if self.now().disabled:
            raise MergeError(f"cannot {what} inside disable_adapter(); leave its context first")
        if any(place.disabled for place in list(self.opened)):
            raise MergeError(
                f"cannot {what} while another thread or coroutine is inside disable_adapter(), whose weights would "
                "change; wait until it has left that"
            )

    # -- what runs -------------------------------------------------------------------------------

    def now(self) -> Running:
        """What a layer that is called now runs with.

        Raises:
            UnsupportedError: what is run again by a checkpoint ran with something that is there no more, or the
                context in which this coroutine or thread was started has ended.

        """
        if self._replica is not None:
            return self._replica.now()
        if torch.compiler.is_compiling():
            if not self.opened:
                return self._everywhere
            return self._nowhere if getattr(self._thread, "disabled", False) else self._found()
        if torch._C._current_graph_task_id() != -1:
            return self._found()
        running = self._in_place()
        if running.ran.place is None or not running.ran.place.recorded:
            self.history.note(running.ran, seen=True)
        return running

    @_not_compiled
    def _found(self) -> Running:
        if asker() is None:
            return self._in_place()
        running = self._again(self._here())
        self.history.note_again(running.ran)
        return running

    def _in_place(self) -> Running:
        """What this code's place says."""
        place = _HERE.get({}).get(self)
        if place is None:
            return self._everywhere
        if not place.open:
            if place.owner == _who():  # a generator that somebody else has closed
                return self._at(self._here())
            raise UnsupportedError(
                "the route() or disable_adapter() in which this coroutine or thread was started has ended; wait for it "
                "inside the context"
            )
        return place.running(self.adapters)

    def _again(self, place: _Place | None) -> Running:
        """What a forward that is run in a backward runs with: what ran when it first was, or what it says itself."""
        asking = asker()
        here = self._at(place)
        if asking is None or self._changed_by == asking or (place is not None and place.asker == asking):
            return here
        ran = self.history.ran(asking.number, here.ran)
        if ran.place is not None and ran.place.disabled:
            if not ran.place.open and ran.place.recorded is None:
                raise UnsupportedError(
                    "gradient checkpointing runs a forward again after its disable_adapter() was left, and torch "
                    "before 2.8 does not tell whether that stood around the checkpoint or in it; call backward() "
                    "inside of it"
                )
            return _running(self.adapters, ran.place)
        if ran.adapters != self.adapters:
            raise UnsupportedError(
                f"gradient checkpointing runs the forward again in the backward, and the adapters have changed since: "
                f"{_words(ran.adapters)} then, {_words(self.adapters)} now. Call backward() before set_adapter(), "
                "merging, unmerging and deleting; for several adapters in one step see route()"
            )
        if ran.place is None:
            return self._everywhere
        if not ran.place.open:
            raise UnsupportedError(
                "route(): gradient checkpointing runs the forward again in the backward, which is outside of the "
                "route; call backward() inside the context: with model.route(names): model(...).loss.backward()"
            )
        return ran.place.running(self.adapters)

    def _note_change(self) -> None:
        """Note that something else runs in this thread from now on."""
        if asker() is None and not recorded():
            self.history.note(self._at(self._here()).ran)

    def _at(self, place: _Place | None) -> Running:
        return self._everywhere if place is None else place.running(self.adapters)

    # -- copies ----------------------------------------------------------------------------------

    def inherited(self) -> ActiveState:
        """That of a replica, which runs in other threads what runs here and now."""
        state = ActiveState()
        state.adapters, state.way, state._replica = self.adapters, self.way, _Replica(self, self.now())
        return state

    def __getstate__(self) -> dict[str, Any]:
        if self.now().disabled:  # who takes the base's copy for the base would have the adapters in it
            raise MergeError("cannot copy or save a model inside disable_adapter(); leave its context first")
        fresh: dict[str, Any] = {"opened": {}, "_replica": None, "_changed_by": None, "_thread": None, "watch": None}
        return {**self.__dict__, **fresh, "watched": set(self.watched)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _thread=threading.local())


@final
class _Replica:
    """What a replica runs: what ran where it was made, unless it says something else itself."""

    def __init__(self, state: ActiveState, inherited: Running) -> None:
        self._state, self._inherited = state, inherited
        self._said = False  # in its forward

    def now(self) -> Running:
        place, asking = self._state._here(), asker()
        if place is not None and place.asker == asking and not self._inherited.disabled:
            self._said = self._said or asking is None
            return self._state._at(place)
        if asking is not None and self._said:
            raise UnsupportedError(
                "gradient checkpointing runs a forward again that was inside a route() or disable_adapter() in a "
                "replica of nn.DataParallel; enter that inside of what the checkpoint runs, or around the replicas"
            )
        return self._inherited


def _words(adapters: Adapters) -> str:
    active = f"{list(adapters.active)} active"
    return f"{active} and {list(adapters.merged)} merged" if adapters.merged else active
