"""One model in training: where it is, and what it has still been told to do."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, final

from torch import Tensor

from ...model.frozen_inputs import FrozenInputs
from .losses import Loss
from .mixed_pass import Outcome, Part, Setup
from .objectives import Objective
from .operations import Forward, ForwardBackward, Operation, Scored
from .token_rows import INPUTS, TokenRow, collate

__all__ = ["Asked", "Reading", "Trainee"]

REMEMBERED = 256  # operations that are done, whose results are given again


@final
@dataclass(eq=False)
class Asked:
    """An operation, and who waits for what comes of it. number: its place among all of its model."""

    number: int
    operation: Operation
    result: Future[Any] = field(default_factory=Future)


@final
class Reading:
    """A forward or a forward and backward that is at work, in pieces that fit into passes.

    Args:
        asked: what was asked for.
        tokens: the most that a piece may have, filled up, where its examples allow it.

    """

    def __init__(self, asked: Asked, operation: Forward | ForwardBackward, tokens: int) -> None:
        self.asked, self.operation = asked, operation
        objective = operation.objective
        self.pieces = deque(_pieces(operation.rows, objective.rows_each, tokens if objective.rowwise else math.inf))
        # A loss that is not an example's own is judged by itself: a new function is like no other part's.
        self._loss: Loss = _same(objective) if objective.rowwise else partial(objective)
        own = operation.divisor if isinstance(operation, ForwardBackward) else None
        self.divisor = operation.objective.count(operation.rows) if own is None else own
        self.before: Tensor | None = None
        self._done: list[Outcome] = []

    @property
    def kind(self) -> str:
        """What passes must have in common."""
        if isinstance(self.operation, ForwardBackward):
            return "learn"
        return "without" if self.operation.without else "evaluate"

    @property
    def started(self) -> bool:
        """Whether a piece is done."""
        return bool(self._done)

    def part(self, trainee: Trainee) -> Part:
        """The next piece."""
        numbers = self.pieces[0]
        rows = [self.operation.rows[i] for i in numbers]
        setup = trainee.setup._replace(loss=self._loss)
        return Part(setup, trainee.name, trainee.slot, trainee.seed, trainee.pieces, rows, list(numbers), self.divisor)

    def done(self, outcome: Outcome) -> bool:
        """A piece is done; whether it was the last."""
        self._done.append(outcome)
        self.pieces.popleft()
        return not self.pieces

    def scored(self) -> Scored:
        """All pieces."""
        logprobs = [
            told[: len(row["input_ids"])].cpu()
            for outcome in self._done
            for told, row in zip(outcome.told if outcome.told is not None else (), outcome.part.rows, strict=True)
        ]
        return Scored(sum(one.total for one in self._done), sum(one.count for one in self._done), logprobs)


@lru_cache(maxsize=256)
def _same(objective: Objective) -> Objective:
    """One object for all that are equal: parts with the same loss share a call of it."""
    return objective


def size_of(rows: Sequence[TokenRow]) -> int:
    """Tokens of a batch, filled up."""
    return len(rows) * max(len(row["input_ids"]) for row in rows)


def _pieces(rows: Sequence[TokenRow], each: int, tokens: float) -> list[range]:
    """Rows in their order, in pieces of whole examples."""
    found, begin = [], 0
    for end in range(each, len(rows) + each, each):
        if end - begin > each and size_of(rows[begin:end]) > tokens:
            found.append(range(begin, end - each))
            begin = end - each
    return [*found, range(begin, len(rows))]


@final
class Trainee:
    """One adapter in training.

    Args:
        name: what it is called.
        setup: its form's rows, and what is beneath it; the loss is each operation's own.
        slot: its row.
        seed: of its start and its dropout.

    Attributes:
        step: steps of the optimizer so far. pieces: passes in which it has learned. used: tokens that were run for it.
            kept: what enters its first block, where that is kept.

    """

    def __init__(self, name: str, setup: Setup, slot: int, seed: int) -> None:
        self.name, self.slot, self.seed = name, slot, seed
        self.setup = setup._replace(collate=collate, inputs=INPUTS, labelled=True)
        self.step = self.pieces = self.used = 0
        self.waiting: dict[int, Asked] = {}
        self.next = 0
        self.reading: Reading | None = None
        self.kept: FrozenInputs | None = None
        self._known: OrderedDict[int, Asked] = OrderedDict()

    def ask(self, number: int, operation: Operation) -> Asked | None:
        """Have an operation wait for its turn; one that has been asked for already is that one. None: long past."""
        if number in self._known:
            return self._known[number]
        if number < self.next:
            return None
        made = Asked(number, operation)
        self._known[number] = self.waiting[number] = made
        while len(self._known) > REMEMBERED and next(iter(self._known)) < self.next:
            self._known.popitem(last=False)
        return made

    def due(self) -> Asked | None:
        """What comes next, if it is there."""
        return self.waiting.get(self.next)

    def end(self, asked: Asked) -> None:
        """An operation is done, however it ended."""
        del self.waiting[asked.number]
        self.next = asked.number + 1
        self.reading = None
