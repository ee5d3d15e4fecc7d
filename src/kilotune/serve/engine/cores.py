"""The processor's cores, shared between an engine's steps and passes of training, so that neither waits in the other.

A step on two threads waits at each product for the slower one. Where a pass of training has one of two cores, that is
the thread beside it: the step would take twice as long, and so would the pass. So for as long as a pass runs, the
engine's steps take the cores that are left.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch

__all__ = ["Cores"]


@final
class Cores:
    """Who computes on how many threads. On a GPU this changes nothing that takes time.

    Args:
        training: threads of a pass of training.
        threads: of an engine's step while nobody trains; by default those of torch.

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
        self._use(max(1, self.threads - self.training) if self._passes else self.threads)

    def _use(self, threads: int) -> None:
        """Torch keeps a number for each thread; one that has begun to compute takes no other one by itself."""
        if getattr(self._own, "threads", None) != threads:
            torch.set_num_threads(threads)
            self._own.threads = threads
