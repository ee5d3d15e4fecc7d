"""Which learning rate to train with, where none is given: the rule's, and a short test of its neighbours.

::

    taken = take_rate(session)      # TakenRate(0.042, "learning rate 0.042: a test of 3 x 21 steps kept it ...")

The test trains for a few steps at a third of the rule's rate for so few steps, at that rate and at three times it, each
from the same start and on the same rows, and holds the losses of the last steps against each other. What was best there
is taken for the whole training: the rule says how a rate goes with the number of steps, the test how this model and
these data differ from those that the rule was made on. Nothing of the test stays: the numbers are put back.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ...errors import DivergedError
from ..settings.rates import TakenRate, rate_for
from ..settings.sections import TrainSettings
from ..trainer.from_settings import make_trainer, quiet, total_steps
from ..trainer.output_folder import processes
from ..trainer.stopping import Stopper
from .events import Event, Listener, watching, without_own_output

if TYPE_CHECKING:
    from .session import Session

__all__ = ["steps_of_test", "take_rate"]

FACTORS = (1 / 3, 1.0, 3.0)
LEAST, MOST = 20, 60  # steps of one of the three
PART = 0.15  # of all steps, that the three may take together
EVALUATIONS = ("eval_every", "early_stopping", "best_metric", "load_best", "eval_batch_size")
BETTER = 0.01  # a neighbour has to be that much better than the rule's rate


def take_rate(session: Session, stopper: Stopper | None = None) -> TakenRate:
    """The learning rate for a session that has not begun.

    Args:
        session: ready to run; its model is as before afterwards.
        stopper: knows whether the user asked to stop; the test then ends with the rule's rate.

    """
    settings = session.settings
    given = settings.training.learning_rate
    if isinstance(given, float | int):
        return TakenRate(float(given), "given")
    method, steps = settings.adapter.method, total_steps(settings, session.prepared, processes())
    value = rate_for(method, steps)
    told = f"learning rate {value:g}: the rule for {method} and {steps:,} steps"
    if given == "rule":
        return TakenRate(value, told)
    each = _each(steps)
    if each < LEAST:
        return TakenRate(value, f"{told} (a test needs {math.ceil(LEAST * len(FACTORS) / PART):,} steps or more)")
    if processes() > 1:
        return TakenRate(value, f"{told} (no test with several processes)")
    short = rate_for(method, each)
    tried: list[tuple[float, float]] = []
    for factor in FACTORS:
        if stopper is not None and stopper.asked:
            return TakenRate(value, f"{told} (its test was broken off)")
        tried.append((short * factor, _loss_after(session, short * factor, each)))
    losses = [loss for _, loss in tried]
    best = losses.index(min(losses))
    if not losses[best] < losses[FACTORS.index(1.0)] * (1 - BETTER):
        best = FACTORS.index(1.0)
    taken = float(f"{value * FACTORS[best]:.2g}")
    shown = ", ".join(f"{loss:.3g} at {rate:.2g}" for rate, loss in tried)
    found = "kept it" if FACTORS[best] == 1.0 else f"gave {taken:g} in place of the rule's {value:g}"
    return TakenRate(taken, f"learning rate {taken:g}: a test of 3 x {each} steps {found} (loss {shown})", tuple(tried))


def steps_of_test(settings: TrainSettings, steps: int) -> int:
    """Steps that the test of a training of so many takes; 0 where there is none."""
    each = _each(steps)
    tests = settings.training.learning_rate in (None, "auto") and each >= LEAST and processes() == 1
    return len(FACTORS) * each if tests else 0


def _each(steps: int) -> int:
    return min(MOST, math.floor(steps * PART / len(FACTORS)))


def _loss_after(session: Session, rate: float, steps: int) -> float:
    """The mean loss of the last third of a short training; infinite where it did not end in numbers."""
    settings = session.settings
    training = settings.training.replace(
        learning_rate=rate, max_steps=steps, save_every=steps + 1, **dict.fromkeys(EVALUATIONS)
    )
    run = settings.replace(training=training, logging=settings.logging.replace(log_every=1))
    losses, model, prepared = _Losses(), session.model, session.prepared
    with tempfile.TemporaryDirectory() as folder, quiet(), watching([losses]) as watcher, session.keeping():
        trainer = make_trainer(run, model, prepared, Path(folder), loss=session.loss, callbacks=[watcher])
        without_own_output(trainer)
        try:
            with _put_back(model):
                trainer.train()
        except DivergedError:
            return math.inf
    return statistics.fmean(losses.found[-max(1, steps // 3) :])


@final
class _Losses(Listener):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def hear(self, event: Event) -> None:
        if event.kind == "train":
            self.found.append(event.values["loss"])

    def close(self) -> None:
        """Nothing is open."""


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Afterwards what is trained, and the statistics that training moves, are what they were, and so is the mode."""
    kept = [(tensor, tensor.detach().clone()) for tensor in _moved(model)]
    mode = model.training
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        model.zero_grad(set_to_none=True)
        model.train(mode)


def _moved(model: nn.Module) -> list[Tensor]:
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    return [*(p for p in model.parameters() if p.requires_grad), *(b for norm in norms for b in norm.buffers())]
