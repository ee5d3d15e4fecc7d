"""Ctrl-C, or a cluster's SIGTERM: the step is finished and a checkpoint written; a second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self, final

__all__ = ["Stopped", "Stopper"]


@final
class Stopped(KeyboardInterrupt):
    """The user stopped the training; the message says what is kept and how to go on."""


@final
class Stopper:
    """While it is entered, in the main thread, the signals only ask.

    Args:
        resumable: what to say of going on, once a checkpoint is written.
        alone: whether this is the only process; of several, each would stop at another step, and wait for the others.

    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, resumable: str, *, alone: bool = True) -> None:
        self.resumable, self.alone = resumable, alone
        self.asked = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if self.alone and threading.current_thread() is threading.main_thread():
            self.before = {name: signal.signal(name, self._ask) for name in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Stopped("stopped at once; the last checkpoint is from before. " + self.resumable)
        self.asked = True
        sys.stderr.write("stopping after this step, with a checkpoint; once more stops at once\n")

    def stop(self, step: int) -> None:
        """A checkpoint is written: stop, if that was asked for.

        Raises:
            Stopped: it was.

        """
        if self.asked:
            raise Stopped(f"stopped after step {step}, which has a checkpoint. {self.resumable}")
