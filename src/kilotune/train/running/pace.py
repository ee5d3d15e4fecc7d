"""How long a training will take: a step of it is run in earnest, and its time multiplied.

::

    pace = pace_of(session, steps=104)
    pace.line()          # "about 2 min (a step of 8 x 34 tokens takes 0.42 s here)"

The batch is an ordinary one, not the largest. Where one row already takes long, the rest of the batch is reckoned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from torch import Tensor

from ...model.adapter_model import AdapterModel
from ...model.frozen_inputs import FrozenInputs
from ..data.rows import Ragged, Rows
from ..settings.fields import EPOCH
from ..trainer.from_settings import steps_of_epoch
from .memory_rehearsal import Step, time_real, twin_of
from .rate_test import steps_of_test

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Pace", "about", "ordinary_rows", "pace_of"]

QUICK = 2.0  # seconds of one row, up to which it is run again
LONG = 20.0  # seconds of a batch, from which on one row of it has to do
DRAWN = 50  # batches that are looked at for an ordinary one
UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
Batch = Mapping[str, Any]


@final
@dataclass(frozen=True)
class Pace:
    """What a training takes of time, in seconds.

    step: one step of the optimizer. steps: how many there are, those of the learning rate's test too. evaluations: all
    of them together. batch: the shape of the batch that was run. rows: how many of its rows; fewer than it has where
    one took long. once: what is computed once a row and kept, with ``adapter.last_blocks``.
    """

    step: float
    steps: int
    evaluations: float
    batch: tuple[int, ...]
    rows: int
    once: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.step * self.steps + self.evaluations + self.once

    def line(self) -> str:
        """As the plan says it."""
        shape = " x ".join(map(str, self.batch))
        what = f"{shape} tokens" if len(self.batch) == 2 else f"{self.batch[0] if self.batch else 1} rows"
        part = ", reckoned from one of its rows" if self.batch and self.rows < self.batch[0] else ""
        each = f"{self.step:.2g}" if self.step < 100 else f"{self.step:,.0f}"
        more = f"; evaluations {about(self.evaluations)} of it" if self.evaluations >= self.seconds / 20 else ""
        return f"about {about(self.seconds)} (a step of {what} takes {each} s here{part}{more})"

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {"seconds": self.seconds, **asdict(self), "batch": list(self.batch)}


def about(seconds: float) -> str:
    """``40 s``, ``2 min``, ``3.5 h``: no more digits than an estimate has."""
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= 1.5 * size), UNITS[-1])
    count = seconds / size
    return f"{max(1, round(count)) if count >= 10 or unit in ('s', 'min') else round(2 * count) / 2:g} {unit}"


def pace_of(session: Session, steps: int, processes: int = 1) -> Pace | None:
    """How fast ``session`` is on its model's device; None where a step cannot be run.

    Args:
        session: ready to run; stays as it is.
        steps: of the optimizer, in all.
        processes: how many train together.

    """
    settings, prepared = session.settings, session.prepared
    run = settings.training
    step = Step(run.precision, 1, settings.model.gradient_checkpointing, session.loss)
    chosen = ordinary_rows(prepared.train, run.batch_size, run.seed)
    with suppress(Exception):  # what the model makes of a batch is told when the training starts
        batch = _shape(prepared.collate(chosen))
        once = 0.0
        if (last := settings.adapter.last_blocks) is not None and run.input_cache != "off":
            forward, whole, rows, more = _timed_with_cache(session, step, chosen, last)
            once = more * len(prepared.train) / len(chosen) / processes  # type: ignore[arg-type]  # of known length
        else:
            forward, whole, rows = _timed(session, step, chosen)
        evaluations = forward * _evaluated(session, steps, processes) / len(chosen)
        tested = steps_of_test(settings, steps)
        return Pace(whole * run.accumulation, steps + tested, evaluations, batch, rows, once)
    return None


def _timed_with_cache(
    session: Session, step: Step, chosen: Sequence[Any], last: int
) -> tuple[float, float, int, float]:
    """The same where what goes into the last blocks is kept; and the seconds that these rows take more at first."""
    with FrozenInputs(session.model, last):  # in memory, also where the session keeps it on disk: nothing is written
        batch = session.prepared.collate(list(chosen))
        _, first = time_real(session.model, batch, step)
        forward, whole = time_real(session.model, batch, step)
    return forward, whole, len(chosen), max(0.0, first - whole)


def _timed(session: Session, step: Step, chosen: Sequence[Any]) -> tuple[float, float, int]:
    """(seconds of a forward, of it and its backward, how many rows were run)."""
    collate = session.prepared.collate
    model = twin_of(session.model) if isinstance(session.model, AdapterModel) else session.model

    def run(rows: Sequence[Any]) -> tuple[float, float]:
        return time_real(model, collate(list(rows)), step)

    forward, whole = run(chosen[:1])
    if whole < QUICK:  # it also set things up, which takes a while and comes once
        forward, whole = map(min, (forward, whole), run(chosen[:1]))
    if whole * len(chosen) > LONG:
        return forward * len(chosen), whole * len(chosen), 1
    forward, whole = run(chosen)
    return forward, whole, len(chosen)


def _evaluated(session: Session, steps: int, processes: int) -> float:
    """How many rows all evaluations together take, in each process."""
    settings, prepared = session.settings, session.prepared
    run, validation = settings.training, prepared.validation
    held: Any = validation
    rows = 0.0
    if held is not None and run.eval_every is not None:
        each = steps_of_epoch(settings, prepared, processes) if run.eval_every == EPOCH else int(run.eval_every)
        rows += len(held) * (steps // each)
    test: Any = prepared.test
    return (rows + (0 if test is None else len(test))) / processes


def ordinary_rows(rows: Any, count: int, seed: int) -> list[Any]:
    """The rows of a batch whose padded size is nearest to the mean of many that are drawn.

    Args:
        rows: a data set of known length, not empty.
        count: the rows of a batch; no more than there are come.
        seed: of the draw.

    """
    count = min(count, len(rows))
    chance = np.random.default_rng(seed)
    drawn = [chance.integers(len(rows), size=count) for _ in range(DRAWN)]
    if isinstance(rows, Rows):
        lengths = next((value.lengths for value in rows.values.values() if isinstance(value, Ragged)), None)
        if lengths is not None:
            sizes = np.array([int(lengths[batch].max()) for batch in drawn])
            drawn = [drawn[int(np.abs(sizes - sizes.mean()).argmin())]]
    return [rows[int(i)] for i in drawn[0]]


def _shape(batch: Any) -> tuple[int, ...]:
    first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return () if first is None else tuple(first.shape)
