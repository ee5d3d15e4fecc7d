"""Learning some lessons, from where a model is until it knows them: short steps, with replay and the guard in each.

::

    a step   new lessons, those first that were learned least      cross-entropy; DPO for pairs; KTO for ratings
             the same corrections to questions in other words      cross-entropy
             corrections that the model knew before                cross-entropy
             texts of the guard                                    KL from what is beneath

A correction that the model knew and does not know any more is learned again. What is drawn is drawn from the lessons
alone, so that the same lessons from the same start come to the same numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, final

from torch import Tensor

from ...config import AdapterConfig
from ...fleet.joint.settings import FleetSettings
from ...fleet.stepper.adam import Adam
from ...fleet.stepper.objectives import Divergence, Dpo, Kto, Objective, Supervised
from ...fleet.stepper.operations import Forward, ForwardBackward, OptimStep, Scored
from .guard import Guarded, Row
from .learner import Learner
from .lessons import Taught

__all__ = ["GREEDY", "Pace", "Study", "correction_scores"]

FORWARD = 16  # rows that are looked at in one operation
GREEDY = 0.5  # a token's probability, from which on it is the greedy one whatever the others have
REWARD = 0.5  # beta times the gain of an answer that was rated, from which on it is learned


@final
@dataclass(frozen=True, kw_only=True)
class Pace:
    """How lessons are learned.

    Args:
        rate: times kilotune's own rule for a training of ``steps`` steps.
        warmup: steps in which the rate rises.
        batch: new lessons of a step.
        replay: corrections of a step that are known already.
        reworded: rows for each new correction of a step, of its question in other words.
        guard: the weight of the guard's KL divergence, beside a mean over the tokens of corrections.
        guarded: texts of the guard in a step.
        pair: the weight of DPO and KTO.
        beta: of both.
        pair_every: in which steps the given answer of a correction is learned to be the worse one.
        sure: a correction is known when each of its tokens is at least so likely; above 0.5, it is the greedy answer.
        likely: and, in a step, each of the answer's to its question in other words at least so.
        steps: at most, for ``batch`` lessons; as many more for each further one as their share.

    """

    rate: float = 0.45
    warmup: int = 3
    batch: int = 2
    replay: int = 2
    reworded: int = 1
    guard: float = 3.0
    guarded: int = 1
    pair: float = 0.3
    beta: float = 0.1
    pair_every: int = 4
    sure: float = 0.7
    likely: float = 0.4
    steps: int = 80

    def everywhere(self) -> Pace:
        """The same for a model that answers whatever is asked: held to what the base says, and in more places."""
        return replace(self, guard=20 / 3 * self.guard, guarded=2 * self.guarded)


@final
class Study:
    """One run of learning.

    Args:
        learner: trains; ``model`` is open in it.
        model: what is learned by.
        config: of its adapter.
        fresh: what is to be learned.
        known: what it knows already; corrections of these are replayed.
        guard: over what it stands on.
        pace: how.
        stay: is called in each step; may raise.
        held: of the known ones, corrections that are to be known in the end, too.

    """

    def __init__(
        self,
        learner: Learner,
        model: str,
        config: AdapterConfig,
        fresh: Sequence[Taught],
        known: Sequence[Taught],
        guard: Guarded,
        pace: Pace,
        stay: Callable[[], None],
        held: Sequence[Taught] = (),
    ) -> None:
        self._learner, self._model = learner, model
        self._fresh, self._guard, self._pace, self._stay = list(fresh), guard, pace, stay
        self._replayable = [one for one in known if one.kind == "correction"]
        self._draws = random.Random(" ".join(one.mark for one in (*fresh, *known)))
        self._guard_order = self._draws.sample(guard.study, len(guard.study))
        self._rate = FleetSettings(seed=0).rate(config, pace.steps) * pace.rate
        new = {one.mark for one in fresh}
        self._held = list(held)
        self._times = {one.mark: 0 for one in (*fresh, *self._replayable)}
        self._learnt = {mark: mark not in new for mark in self._times}
        self._references: dict[str, tuple[float, float]] = {}
        self.steps = 0

    @property
    def limit(self) -> int:
        """Steps at most."""
        return math.ceil(self._pace.steps * max(1.0, len(self._fresh) / self._pace.batch / 2))

    def unlearnt(self) -> list[Taught]:
        """New lessons that it did not know when it was looked at them last."""
        return [one for one in self._fresh if not self._learnt[one.mark]]

    def run(self) -> None:
        """Learn, until everything is known or there were enough steps."""
        while self.steps < self.limit:
            self._stay()
            batch = self._batch()
            if not batch:
                self._look([*self._fresh, *self._held])
                if not self._batch():
                    return
                continue
            if self._learn(batch):
                return  # known by the numbers that there are: the step is not made
            how = Adam(rate=self._rate * min(1.0, (self.steps + 1) / self._pace.warmup))
            self._learner.submit(self._model, OptimStep(how)).result()
            self.steps += 1
        self._look(self._fresh)

    # -- a step --------------------------------------------------------------------------------------

    def _batch(self) -> list[Taught]:
        """What is to be learned in the next step, as far as is known now."""
        wanted = [one for one in (*self._fresh, *self._held) if not self._learnt[one.mark]]
        return sorted(wanted, key=lambda one: self._times[one.mark])[: self._pace.batch]

    def _all_known(self, batch: Sequence[Taught]) -> bool:
        """Whether there is nothing to be learned; looks at all that there is but ``batch``, which was seen just now."""
        if self._batch():
            return False
        self._look([one for one in (*self._fresh, *self._held) if one not in batch])
        return not self._batch()

    def _learn(self, batch: Sequence[Taught]) -> bool:
        """Forward and backward of all that a step has; what was new is noted as it stood before the step.

        Whether all of it was known.
        """
        for one in batch:
            self._times[one.mark] += 1
        by_kind = {kind: [one for one in batch if one.kind == kind] for kind in ("correction", "choice", "rating")}
        corrections, asked = by_kind["correction"], []
        learnt = [one for one in self._fresh if self._learnt[one.mark] and one.kind == "correction"]
        known = [one for one in (*self._replayable, *learnt) if one not in batch]
        replayed = self._draws.sample(known, min(self._pace.replay, len(known)))
        cut = len(replayed) - len(replayed) // 2 * min(1, self._pace.reworded)  # half of them in other words
        own = [*corrections, *replayed[:cut]]
        own += [one for one in replayed[cut:] if not one.reworded]
        if rows := [*(one.rows[0] for one in own), *self._others(corrections, replayed[cut:])]:
            scored = self._submit(rows, Supervised(), 1.0).result()
            self._note(own, scored)
            self._doubt(corrections, rows[len(own) :], scored.logprobs[len(own) :])
            if len(corrections) == len(batch) and self._all_known(batch):
                return True  # before the guard is run
        pairs = [*by_kind["choice"], *(one for one in corrections if self._pairs(one))]
        if pairs:
            asked.append((by_kind["choice"], self._submit(self._referred(pairs), self._dpo, self._pace.pair)))
        if by_kind["rating"]:
            rows = self._referred(by_kind["rating"])
            asked.append((by_kind["rating"], self._submit(rows, self._kto, self._pace.pair)))
        order, begin = self._guard_order, self.steps * self._pace.guarded
        texts = [order[i % len(order)] for i in range(begin, begin + self._pace.guarded)]
        share = self._pace.guard / len(texts)  # each is a pass of its own, so that who is answered waits for one
        held = [self._submit([text], Divergence((self._guard.said(text),)), share) for text in texts]
        for lessons, scored in asked:
            self._note(lessons, scored.result())
        for guarded in held:
            guarded.result()
        return self._all_known(batch)

    def _others(self, corrections: Sequence[Taught], replayed: Sequence[Taught]) -> list[Row]:
        """Of a step, rows of questions in other words: of each that is to be learned, and of those replayed."""
        again = [one for one in corrections for _ in range(self._pace.reworded)]
        return [self._draws.choice(one.reworded) for one in (*again, *replayed) if one.reworded]

    def _doubt(self, corrections: Sequence[Taught], rows: Sequence[Row], told: Sequence[Tensor]) -> None:
        """Those of whose questions in other words, which come first among these rows, the answer is not likely."""
        again = [one for one in corrections if one.reworded for _ in range(self._pace.reworded)]
        for one, row, each in zip(again, rows, told, strict=False):
            if not bool((each.exp() >= self._pace.likely)[_labelled(row)].all()):
                self._learnt[one.mark] = False

    def _pairs(self, one: Taught) -> bool:
        return len(one.rows) == 2 and self._times[one.mark] % self._pace.pair_every == 1

    def _submit(self, rows: Sequence[Row], objective: Objective, weight: float) -> Future[Any]:
        divisor = objective.count(rows) / weight
        return self._learner.submit(self._model, ForwardBackward(rows, objective, divisor))

    @property
    def _dpo(self) -> Dpo:
        return Dpo(beta=self._pace.beta)

    @property
    def _kto(self) -> Kto:
        return Kto(beta=self._pace.beta)

    def _referred(self, lessons: Sequence[Taught]) -> list[Row]:
        """Rows of pairs, with what the model says of them without the adapter."""
        rows = []
        for one in lessons:
            if one.mark not in self._references:
                scored = self._learner.submit(self._model, Forward(one.rows, without=True)).result()
                first, second = (float(told.sum()) for told in scored.logprobs)
                self._references[one.mark] = first, second
            for row, reference in zip(one.rows, self._references[one.mark], strict=True):
                good = {"good": float(one.good)} if one.kind == "rating" else {}
                rows.append({**row, "reference": reference, **good})
        return rows

    # -- what is known ---------------------------------------------------------------------------------

    def _look(self, lessons: Sequence[Taught]) -> None:
        """See which lessons the model knows now."""
        for begin in range(0, len(lessons), FORWARD):
            self._stay()
            some = lessons[begin : begin + FORWARD]
            for kind in ("correction", "choice", "rating"):
                if own := [one for one in some if one.kind == kind]:
                    rows = [row for one in own for row in (one.rows[:1] if kind == "correction" else one.rows)]
                    self._note(own, self._learner.submit(self._model, Forward(rows)).result())

    def _note(self, lessons: Sequence[Taught], scored: Scored) -> None:
        """Whether these, whose rows come first among those scored, are known."""
        told, place = scored.logprobs, 0
        for one in lessons:
            if one.kind == "correction":
                sure = GREEDY if one in self._held else self._pace.sure
                learnt = bool((told[place].exp() >= sure)[_labelled(one.rows[0])].all())
                place += 1
            else:
                learnt = self._settled(one, float(told[place].sum()), float(told[place + 1].sum()))
                place += 2
            self._learnt[one.mark] = learnt

    def _settled(self, one: Taught, first: float, second: float) -> bool:
        """Whether a choice or a rating is learned, by the log-probabilities of its two rows."""
        if one.mark not in self._references:
            self._referred([one])
        own, other = self._references[one.mark]
        if one.kind == "choice":
            return first > second and (first - own) - (second - other) >= REWARD / self._pace.beta
        gain = self._pace.beta * (first - own)
        return gain >= REWARD or first > -1.0 if one.good else gain <= -REWARD


def _labelled(row: Row) -> list[int]:
    return [place for place, label in enumerate(row["labels"]) if place and label != -100]


def correction_scores(learner: Learner, model: str, rows: Sequence[Row]) -> list[tuple[float, float]]:
    """Of each row's answer: nats a token, and the probability of its least likely token."""
    found: list[tuple[float, float]] = []
    for begin in range(0, len(rows), FORWARD):
        some = rows[begin : begin + FORWARD]
        scored = learner.submit(model, Forward(some)).result()
        for told, row in zip(scored.logprobs, some, strict=True):
            places = _labelled(row)
            found.append((-float(told.sum()) / len(places), float(told[places].min().exp())))
    return found
