"""What happens in a training, told to listeners: the progress, the history, or whoever wants to know.

A listener hears :class:`Event` objects and knows nothing of transformers; one callback turns the Trainer's events into
them, in the main process only::

    listeners = [progress_for(settings.logging), History(folder / "logs", resume_step=None)]
    with watching(listeners, unit="tokens") as callback:      # closes them, whatever happens
        trainer = Trainer(..., callbacks=[callback])
        without_own_output(trainer)                           # the Trainer's own bar and its printed dicts
        trainer.train()

For tokens per second the Trainer has to count: ``TrainingArguments(include_num_input_tokens_seen="non_padding")``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch

from ...errors import MissingExtraError

__all__ = ["Event", "Listener", "memory_in_use", "watching", "without_own_output"]

PREFIXES: Mapping[str, str] = {"eval_": "validation", "test_": "test"}
SPEEDS = ("_runtime", "_per_second", "_model_preparation_time")  # what transformers adds to every evaluation
LOST = ("epoch", "num_input_tokens_seen", "total_flos")  # told by the event itself, or by nobody


@final
@dataclass(frozen=True)
class Event:
    """One thing that happened.

    kind: ``start``, ``step`` (an optimizer step is done), ``train`` (the mean loss since the last one, the learning
    rate), ``evaluating`` (a batch of an evaluation is done), ``validation``, ``test``, ``save``, ``end``. step, steps:
    optimizer steps done, and in all. first: the step that this session began at, more than 0 after a resume. epoch,
    epochs: done, and in all. seconds: since this session began. seen: tokens (or rows, by ``unit``) since then. memory:
    bytes; on CUDA the most so far, elsewhere what the process has now. values: numbers by name, without prefixes.
    """

    kind: str
    step: int = 0
    steps: int = 0
    first: int = 0
    epoch: float = 0.0
    epochs: float = 0.0
    seconds: float = 0.0
    seen: int = 0
    unit: str = "tokens"
    memory: int = 0
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """``unit`` per second since the session began, evaluations included; 0 before anything is done."""
        return self.seen / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the speed so far; None before the first step."""
        done = self.step - self.first
        return self.seconds / done * (self.steps - self.step) if done > 0 else None


class Listener(ABC):
    """Hears what happens."""

    @abstractmethod
    def hear(self, event: Event) -> None:
        """One event; called in the training's own thread, so it should be quick."""

    @abstractmethod
    def close(self) -> None:
        """The training is over, or was broken off; may be called again, and events may still come (of a test split)."""


def memory_in_use(device: torch.device) -> int:
    """Bytes: on CUDA the most that tensors have taken so far, elsewhere what this process has; 0 where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


@contextmanager
def watching(
    listeners: Sequence[Listener], *, unit: str = "tokens", clock: Callable[[], float] = time.monotonic
) -> Iterator[Any]:
    """A transformers ``TrainerCallback`` that tells ``listeners``; they are closed at the end, whatever happened.

    Args:
        listeners: in the order in which they hear.
        unit: ``tokens``, if the Trainer counts them, or ``rows``.
        clock: seconds, from any start.

    Raises:
        MissingExtraError: transformers is not installed.

    """
    try:
        yield _callback(_Teller(tuple(listeners), unit, clock))
    finally:
        for listener in listeners:
            listener.close()


def without_own_output(trainer: Any) -> None:
    """Take the Trainer's own progress bar and its printing of dicts away; the listeners do that."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)


@final
class _Teller:
    """Turns what the Trainer's callbacks are given into events."""

    def __init__(self, listeners: Sequence[Listener], unit: str, clock: Callable[[], float]) -> None:
        self.listeners, self.unit, self.clock = listeners, unit, clock
        self.began, self.first, self.seen_before = clock(), 0, 0
        self.evaluated = 0

    def start(self, args: Any, state: Any) -> None:
        self.began, self.first, self.seen_before = self.clock(), state.global_step, state.num_input_tokens_seen
        self.tell("start", args, state, {})

    def tell(self, kind: str, args: Any, state: Any, values: Mapping[str, float]) -> None:
        """To all, in the main process."""
        if not state.is_world_process_zero:
            return
        done = state.global_step - self.first
        rows = done * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        event = Event(
            kind=kind,
            step=state.global_step,
            steps=state.max_steps,
            first=self.first,
            epoch=float(state.epoch or 0.0),
            epochs=float(state.num_train_epochs),
            seconds=self.clock() - self.began,
            seen=state.num_input_tokens_seen - self.seen_before if self.unit == "tokens" else rows,
            unit=self.unit,
            memory=memory_in_use(args.device),
            values=values,
        )
        for listener in self.listeners:
            listener.hear(event)

    def log(self, args: Any, state: Any, logs: Mapping[str, Any]) -> None:
        """The Trainer logs a loss, an evaluation, or the sums at the end, and says which by prefixes alone."""
        numbers = {k: float(v) for k, v in logs.items() if k not in LOST and isinstance(v, int | float)}
        for prefix, kind in PREFIXES.items():
            found = {k.removeprefix(prefix): v for k, v in numbers.items() if k.startswith(prefix)}
            if found:
                self.tell(kind, args, state, {k: v for k, v in found.items() if not f"_{k}".endswith(SPEEDS)})
        if "train_loss" in numbers:
            self.tell("end", args, state, {"loss": numbers["train_loss"]})
        elif "loss" in numbers:
            self.tell("train", args, state, {k: v for k, v in numbers.items() if not k.startswith("train_")})

    def evaluating(self, args: Any, state: Any, loader: Any) -> None:
        """One batch of an evaluation is done."""
        self.evaluated += 1
        values = {"done": float(self.evaluated)}
        with suppress(TypeError):  # a stream has no length
            values["of"] = float(len(loader))
        self.tell("evaluating", args, state, values)


def _callback(teller: _Teller) -> Any:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtraError("transformers", "train", "training") from error

    @final
    class Watcher(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        """What the Trainer calls."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            teller.start(args, state)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            teller.tell("step", args, state, {})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            teller.log(args, state, logs or {})

        def on_prediction_step(
            self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any
        ) -> None:
            teller.evaluating(args, state, eval_dataloader)

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            teller.evaluated = 0

        def on_predict(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            teller.evaluated = 0

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            teller.tell("save", args, state, {})

    return Watcher()
