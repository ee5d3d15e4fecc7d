"""The processor's cores, shared between an engine's steps and passes of training, so that neither waits in the other.

A step on two threads waits at each product for the slower one. Where a pass of training has one of two cores, that is
the thread beside it: the step would take twice as long, and so would the pass. So for as long as a pass runs, the
engine's steps take the cores that are left.

OpenMP keeps helpers for each thread that has computed with several, for as long as that thread lives. Once the helpers
of all threads are more than the cores, each of them sleeps at the end of each product, and has to be woken for the
next: on two cores, two threads were slower than one. So an engine and training have no more between them than there are
cores; threads of the service's own that compute beside them do it alone; and a base is loaded :func:`apart`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, final

import torch

__all__ = ["Cores", "apart", "compute_alone", "compute_on"]

T = TypeVar("T")
_changing = threading.Lock()


def apart(compute: Callable[[], T]) -> T:
    """What a thread that ends with it gives: OpenMP's helpers end too."""
    with ThreadPoolExecutor(1, "kilotune-apart") as thread:
        return thread.submit(compute).result()


def compute_on(threads: int) -> None:
    """Have this thread compute on so many from now on; all others, and those that begin later, on as many as before."""
    with _changing:
        later = apart(torch.get_num_threads)
        torch.get_num_threads()  # else the thread's first product sets what was set last, in any thread
        torch.set_num_threads(threads)
        apart(lambda: torch.set_num_threads(later))


def compute_alone() -> None:
    """Have this thread compute without helpers: for pools of threads that do it beside an engine."""
    compute_on(1)


@final
class Cores:
    """Who computes on how many threads. On a GPU this changes nothing that takes time.

    Args:
        training: threads of a pass of training.
        threads: of an engine's step while nobody trains, where training has one; by default those of torch.

    """

    def __init__(self, training: int = 1, threads: int | None = None) -> None:
        self.training = training
        self.threads = torch.get_num_threads() if threads is None else threads
        self._lock = threading.Lock()
        self._passes = 0
        self._own = threading.local()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Run a pass of training, in this thread."""
        with self._lock:
            self._passes += 1
        self._use(self.training)
        try:
            yield
        finally:
            with self._lock:
                self._passes -= 1

    def serve(self) -> None:
        """A step of an engine is to run in this thread."""
        self._use(max(1, self.threads - self.training + (not self._passes)))

    def _use(self, threads: int) -> None:
        if getattr(self._own, "threads", None) != threads:
            compute_on(threads)
            self._own.threads = threads
