"""The processor's cores, shared between an engine's steps and passes of training, so that neither waits in the other.

A step on two threads waits at each product for the slower one. Where a pass of training has one of two cores, that is
the thread beside it: the step would take twice as long, and so would the pass. So for as long as a pass runs, the
engine's steps take the cores that are left.

OpenMP keeps helpers for each thread that has computed with several, for as long as that thread lives. Once the helpers
of all threads are more than the cores, each of them sleeps at the end of each product, and has to be woken for the
next: on two cores, two threads were slower than one. So an engine and training have no more between them than there are
cores; threads that begin beside them compute alone; and a base is loaded :func:`apart`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, final

import torch

__all__ = ["Cores", "apart"]

T = TypeVar("T")


def apart(compute: Callable[[], T]) -> T:
    """What a thread that ends with it gives: OpenMP's helpers end too."""
    with ThreadPoolExecutor(1, "kilotune-apart") as thread:
        return thread.submit(compute).result()


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
        """Torch keeps a number for each thread; one that has begun to compute takes no other one by itself."""
        if getattr(self._own, "threads", None) != threads:
            torch.get_num_threads()  # else the thread's first product sets what was set last, in any thread
            torch.set_num_threads(threads)
            apart(lambda: torch.set_num_threads(1))  # for threads that begin later; they would take as many as this one
            self._own.threads = threads
