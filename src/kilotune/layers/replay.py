"""What ran in a forward, for who runs it again: gradient checkpointing does, in the backward.

By then other adapters may be active and a context may have been left; and a thread of autograd's own knows of no
context at all. But autograd numbers the nodes of its graph in the order in which a thread makes them, and tells which
one runs now. So each thread notes from which number on what has run in it, and what runs again looks up the number of
the node that asked for it::

    number    0 ... 41     42 ... 97           98 ...
    noted     "ann"        disabled            "ann"
                 |                                |
                 node 17: runs "ann" again        the next node

In a reentrant checkpoint the node is made before its forward runs, in any other it is one of those that the forward
makes; both stand between the same two notes.

torch's internals that this rests on are all in this file. Tested with torch 2.13, there since 2.1; torch itself hands
objects to autograd's threads in this way (torch/_inductor/cudagraph_trees.py).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any, Generic, NamedTuple, TypeVar, final
from weakref import WeakKeyDictionary

import torch

from ..errors import UnsupportedError

__all__ = ["Asker", "History", "asker", "recorded"]

KEPT = 4096  # notes of a thread; without new nodes between them, the later one takes the place of the earlier
CALLER = "kilotune.caller"  # what autograd's own threads know their caller by

V = TypeVar("V", bound=Hashable)


class Asker(NamedTuple):
    """The backward, and in it the node, that runs now."""

    task: int
    number: int


def asker() -> Asker | None:
    """Who has this code run; None outside of a backward."""
    task = torch._C._current_graph_task_id()
    node = None if task == -1 else torch._C._current_autograd_node()
    return None if node is None else Asker(task, node._sequence_nr())


# New in torch 2.8.
_top_hooks: Callable[[bool], tuple[Any, Any] | None] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)


def recorded() -> bool | None:
    """Whether this code is in what a checkpoint runs, which is not a reentrant one; None where it cannot be told."""
    if _top_hooks is None:
        return None
    hooks = _top_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def _next_number() -> int:
    """The number of the next node that this thread makes."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


@final
class _Caller:
    """One thread, for those that autograd starts to do its work."""


@final
class _Note(NamedTuple, Generic[V]):
    """From node ``number`` on; perhaps from the one before on, where it was ``seen`` inside of a forward."""

    number: int
    value: V
    seen: bool


@final
class _Notes(Generic[V]):
    """Those of one thread."""

    def __init__(self) -> None:
        self.last: V | None = None
        self.kept: deque[_Note[V]] = deque(maxlen=KEPT)

    def add(self, value: V, seen: bool) -> None:
        number = _next_number()
        while self.kept and self.kept[-1].number == number and not self.kept[-1].seen:
            self.kept.pop()  # no node was made meanwhile
            seen = False
        if not self.kept or self.kept[-1].value != value:
            self.kept.append(_Note(number, value, seen))
        self.last = value

    def at(self, number: int) -> set[V]:
        """What may have run when node ``number`` was made; empty where no note goes so far back."""
        after: _Note[V] | None = None
        for note in reversed(self.kept):
            if note.number <= number:
                return {note.value, after.value} if _next_to(number, after) and after is not None else {note.value}
            after = note
        return {after.value} if _next_to(number, after) and after is not None else set()


def _next_to(number: int, note: _Note[V] | None) -> bool:
    """Whether node ``number`` may belong to a forward in which ``note`` was made: a reentrant checkpoint's."""
    return note is not None and note.seen and note.number == number + 1


@final
class History(Generic[V]):
    """What has run in each thread, of one model. A copy is empty."""

    def __init__(self) -> None:
        self._here = threading.local()
        self._of: WeakKeyDictionary[_Caller, _Notes[V]] = WeakKeyDictionary()
        self._again: dict[int, set[V]] = {}  # by the number of a reentrant checkpoint inside of what runs again

    def note(self, value: V, seen: bool = False) -> None:
        """``value`` runs from now on, in this thread, outside of a backward.

        seen: it has begun before, and without gradients perhaps before the node of a reentrant checkpoint.
        """
        notes: _Notes[V] | None = getattr(self._here, "notes", None)
        if notes is None:
            notes = self._here.notes = _Notes()
            with _LOCK:
                self._of[_this_caller()] = notes
        if notes.last is not value:
            notes.add(value, seen and not torch.is_grad_enabled())
        if self._again:
            self._again.clear()

    def note_again(self, value: V) -> None:
        """``value`` runs in a forward that is run again; a reentrant checkpoint in it will ask once more."""
        if not torch.is_grad_enabled():
            self._again.setdefault(_next_number() - 1, set()).add(value)

    def ran(self, number: int, now: V) -> V:
        """What ran when node ``number`` was made; ``now`` where there is only one answer that it can be.

        Raises:
            UnsupportedError: it cannot be told.

        """
        caller = torch._C._get_obj_in_tls(CALLER) if torch._C._is_key_in_tls(CALLER) else None
        notes = None if caller is None else self._of.get(caller)
        inner = self._again.get(number, set())
        if inner and notes is getattr(self._here, "notes", None):  # made by this very thread
            found = inner
        else:
            found = inner | (set() if notes is None else notes.at(number))
        if not found:  # another thread's forward
            with _LOCK:
                others = list(self._of.values())
            found = set().union(*(other.at(number) for other in others))
        if len(found) > 1:
            raise UnsupportedError(
                "gradient checkpointing runs a forward again, and it cannot be told which adapters it ran with: they "
                "were changed in other threads or coroutines meanwhile; run forward and backward in one thread, and "
                "change them between steps"
            )
        return next(iter(found), now)

    def __reduce__(self) -> tuple[type[History[V]], tuple[()]]:
        return History, ()


_THREADS, _LOCK = threading.local(), threading.Lock()


def _this_caller() -> _Caller:
    """What stands for this thread, which autograd's own threads are given when they work for it."""
    caller: _Caller | None = getattr(_THREADS, "caller", None)
    if caller is None:
        caller = _THREADS.caller = _Caller()
        torch._C._stash_obj_in_tls(CALLER, caller)
    return caller
