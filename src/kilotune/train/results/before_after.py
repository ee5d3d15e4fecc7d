"""What a training changed: the base against the fine-tune on rows that were held out, by loss and by what each writes.

::

    compared = compare(session, trainer)       # Compared(split="test", rows=64, base=4.91, tuned=0.9, ...)
    compared.verdict                           # says plainly when nothing was learnt, and what to try
    samples_of(session)                        # a few prompts, what was wanted, and what base and fine-tune write

Both take some seconds: what is slow is done for fewer rows. Of what replaces a part of the base (a new head, all of its
weights) there is no base to hold it against.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, final

import numpy as np
from torch.utils.data import Subset

from ...errors import KilotuneError
from ...model.peft_model import PeftModel
from ..data.batches import IGNORED
from ..finished.sampling_options import Sampling
from ..finished.text_generation import Writer
from ..running.session import Session
from ..trainer import output_folder

__all__ = ["Compared", "Sample", "compare", "samples_of"]

MOST, LEAST = 64, 8  # rows that are compared
SHOWN = 3  # rows of which answers are shown
SECONDS = 20.0  # for the losses, and for the answers
LONGEST = 48  # tokens of an answer, or of the beginning of a text
SAME = 0.01  # of the base's loss: less is no change
FELL = 0.9  # of the first step's loss: below it, the training rows were learnt


@final
@dataclass(frozen=True)
class Compared:
    """The mean loss of the base and of the fine-tune on the same rows.

    split: test or validation; train where nothing was held out. rows: how many of it. first, last: the loss of the
    first and of the last logged steps; None where none was. rate, steps: of the training.
    """

    split: str
    rows: int
    base: float
    tuned: float
    first: float | None
    last: float | None
    rate: float
    steps: int

    @property
    def learnt(self) -> bool:
        """Whether the fine-tune's loss is the smaller one, by more than chance gives."""
        return self.tuned < self.base - SAME * abs(self.base)

    @property
    def line(self) -> str:
        """The two numbers."""
        what = "of train, for none were held out" if self.split == "train" else f"of {self.split}"
        return f"loss {self.tuned:.4g}, of the base {self.base:.4g} (on {self.rows:,} rows {what})"

    @property
    def verdict(self) -> str:
        """What to do where nothing was learnt; empty where something was."""
        if self.learnt:
            return ""
        both = f"the loss is {self.tuned:.4g}, and the base's is {self.base:.4g}"
        if self.split != "train" and self.first is not None and self.last is not None and self.last < FELL * self.first:
            return (
                f"The rows of train were learnt by heart, and held-out rows gained nothing: {both}. Two things to try: "
                f"more rows, and fewer steps than {self.steps:,} (training.epochs, training.early_stopping)."
            )
        return (
            f"Nothing was learnt: {both}. Two things to try: a higher learning rate (training.learning_rate was "
            f"{self.rate:.2g}; try {10 * self.rate:.2g}), and more steps than {self.steps:,} (training.epochs, or more "
            "rows)."
        )

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {**asdict(self), "learnt": self.learnt}


@final
@dataclass(frozen=True)
class Sample:
    """A held-out row: what was asked, what was wanted, and what the base and the fine-tune write."""

    prompt: str
    wanted: str
    base: str
    tuned: str


def _held_out(session: Session) -> tuple[str, Any]:
    prepared = session.prepared
    splits = {"test": prepared.test, "validation": prepared.validation, "train": prepared.train}
    return next((name, rows) for name, rows in splits.items() if rows is not None)


def _has_base(session: Session) -> bool:
    """Whether the base is still there once the adapter is off."""
    model = session.model
    return isinstance(model, PeftModel) and not model.installed("default").saved and not session.settings.training.shard


def compare(session: Session, trainer: Any, seconds: Sequence[float] = ()) -> Compared | None:
    """The losses of base and fine-tune on some held-out rows; None where there is no base to hold it against.

    Args:
        session: over.
        trainer: of it.
        seconds: of each step; where they are long, fewer rows are compared.

    """
    model: Any = session.model
    if not _has_base(session):
        return None
    run = session.settings.training
    split, rows = _held_out(session)
    count = MOST
    if seconds and output_folder.processes() == 1:  # several have to take as many
        count = int(SECONDS / max(1e-9, median(seconds) / run.batch_size / run.accumulation))
    count = min(len(rows), max(LEAST, min(MOST, count)))
    chosen: Any = Subset(rows, [i * len(rows) // count for i in range(count)])
    with model.disable_adapter():
        base = trainer.evaluate(chosen, metric_key_prefix="base")["base_loss"]
    tuned = trainer.evaluate(chosen, metric_key_prefix="tuned")["tuned_loss"]
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return Compared(
        split=split,
        rows=count,
        base=float(base),
        tuned=float(tuned),
        first=losses[0] if losses else None,
        last=losses[-1] if losses else None,
        rate=float(trainer.args.learning_rate),
        steps=int(trainer.state.global_step),
    )


# -- what they write -----------------------------------------------------------------------------------


def samples_of(session: Session, clock: Callable[[], float] = time.monotonic) -> list[Sample]:
    """What base and fine-tune write for the first rows that were held out; nothing where they write no text.

    Args:
        session: over.
        clock: seconds, from any start; no row is begun after :data:`SECONDS`.

    """
    writes = session.settings.task in ("causal-lm", "seq2seq")
    if not writes or not _has_base(session) or session.processor is None:
        return []
    model: Any = session.model
    _, rows = _held_out(session)
    found: list[Sample] = []
    end = clock() + SECONDS
    with contextlib.suppress(KilotuneError):  # a model that cannot generate: then there is nothing to show
        for i in range(min(SHOWN, len(rows))):
            if found and clock() > end:
                break
            ids, wanted = _asked(rows[i], session.prepared.form)
            writer = Writer(model, session.processor, Sampling(max_tokens=min(LONGEST, len(wanted) + 8)))
            with model.disable_adapter():
                base = writer.write(ids).text
            found.append(Sample(_text(session, ids), _text(session, wanted), base, writer.write(ids).text))
    return found


def _asked(row: Any, form: str | None) -> tuple[list[int], list[int]]:
    """(the tokens that the model is given, those that it should write) of a prepared row."""
    ids, labels = [int(i) for i in row["input_ids"]], np.asarray(row["labels"])
    if form == "source":
        return ids, [int(label) for label in labels if label != IGNORED]
    if form == "text":
        half = max(1, min(LONGEST, len(ids) // 2))
        return ids[:half], ids[half : half + LONGEST]
    learned = np.flatnonzero(labels != IGNORED)
    start = int(learned[0])
    end = next((i for i in range(start, len(ids)) if labels[i] == IGNORED), len(ids))
    return ids[:start], ids[start:end]


def _text(session: Session, ids: Sequence[int]) -> str:
    return str(
        session.processor.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ).strip()
