"""What learns from feedback: for each user whose turn it is, from feedback to a version that answers, or does not.

::

    taken back      versions that learned it are removed, alias and all; what stands is learned again from the beginning
    new             learned (study.py), from the live version where there is one
    gate.py         lets it pass: kept with the alias ``live`` in one transaction; else kept without
    turns.py        an event says which

A version's metadata has the marks of all lessons in it. A run that was killed is made again, from the same lessons and
the same start to the same numbers; what it had published has its marks, so there is nothing new then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, final

from ...config import AdapterConfig
from ...errors import AdapterError, KilotuneError, ResourceError, StoreError, UnsupportedError
from ...fleet.stepper.operations import Save
from ...fleet.store import SharedVersion, Version
from ...fleet.store.documents import Documents
from ...model.kept_rows import KeptRows
from ..engine.interface import AdapterKey, Engine
from ..engine.tenant_adapters import AdapterRegistry
from .feedback import Feedback, Lesson
from .gate import Bounds, Gate, Verdict
from .guard import Guard, Guarded
from .learner import Learner
from .lessons import Maker, Taught, Unread, current, mark_of, read_lessons
from .rollback import RollbackRule, marks_of, packed, shared_in, watch
from .scope import Scopes
from .study import Pace, Study
from .turns import LEARNING, Turn, events, tell, wake
from .users import LIVE, model_of, without_user
from .workers import Claim, LeftError, Workers

__all__ = ["LearningCounts", "PersonalRunner"]

LESSONS = 4096  # of a user that are learned
AT_A_TIME = 32  # new lessons of a run; who has more has another turn, after those of others
KEPT = 8  # versions of a user's model, and as many that were refused
KEPT_INPUTS = 64.0  # megabytes of what enters the last blocks, of a model that learns
TOLD = 64  # versions of which is remembered that they were told of
AGAIN = 30.0  # seconds after which is tried again what there was no room for
log = logging.getLogger("kilotune.serve")


@final
class LearningCounts(NamedTuple):
    """Since the start, of all users.

    learned, refused, failed: runs, by what came of them; lessons: that were new in those that went live, and
    corrections: of them. taken_back: runs that removed versions. rolled_back: shared adapters, by their ratings.
    seconds: of all runs; correction_seconds: of corrections, from when they came to when they were live.
    """

    learned: int = 0
    refused: int = 0
    failed: int = 0
    lessons: int = 0
    corrections: int = 0
    taken_back: int = 0
    rolled_back: int = 0
    seconds: float = 0.0
    correction_seconds: float = 0.0


@final
class PersonalRunner:
    """Learns from the feedback of a store's namespaces.

    Args:
        documents: of all namespaces.
        learner: trains.
        adapters: where models are published.
        engine: that answers, with them.
        config: of the adapter of a model that begins.
        make: makes rows of texts.
        pace, bounds, rule: see there.
        at_once: users whose models learn at once here.
        scopes: which forget what was taken back; None: there are none here.

    """

    def __init__(
        self,
        documents: Documents,
        learner: Learner,
        adapters: AdapterRegistry,
        engine: Engine,
        config: AdapterConfig,
        make: Maker,
        pace: Pace | None = None,
        bounds: Bounds | None = None,
        rule: RollbackRule | None = None,
        at_once: int = 4,
        scopes: Scopes | None = None,
    ) -> None:
        self.documents, self.learner, self.adapters = documents, learner, adapters
        self.engine, self.config, self.scopes = engine, config, scopes
        self.make, self.pace = make, pace or Pace()
        self.bounds, self.rule = bounds or Bounds(), rule or RollbackRule()
        self._workers = Workers(documents, LEARNING, self._work, at_once)
        self._counts = LearningCounts()

    @cached_property
    def guard(self) -> Guard:
        """Read when somebody first learns; raises ConfigError, see there."""
        return Guard(self.make, self.engine)

    def start(self) -> None:
        """Begin to look for users whose turn it is."""
        self._workers.start()

    def stop(self) -> None:
        """End; runs are made again by another server, or the next start."""
        self._workers.stop()

    def counts(self) -> LearningCounts:
        """What was done."""
        return self._counts

    def count(self, **more: float) -> None:
        """Add to what was done."""
        now = self._counts._asdict()
        self._counts = LearningCounts(**{name: value + more.get(name, 0) for name, value in now.items()})

    def _work(self, claim: Claim) -> None:
        began = time.monotonic()
        try:
            _Run(self, claim).run()
        finally:
            self.count(seconds=time.monotonic() - began)


@final
class _Plan(NamedTuple):
    """What a run is about. live: what is gone on from; None: from the beginning, and ``again``: of what was live. held:
    the marks of what it has learned, of which ``known`` are still to be known. more: there is more that is new."""

    live: Version | None
    on: SharedVersion | None
    fresh: list[Taught]
    known: list[Taught]
    held: set[str]
    again: bool
    more: bool


@final
class _Run:
    """One user's turn."""

    def __init__(self, runner: PersonalRunner, claim: Claim) -> None:
        self.runner, self.claim = runner, claim
        self.namespace = claim.document.namespace
        self.documents = runner.documents.within(self.namespace)
        self.turn = Turn(self.documents, claim.document)
        self.user = self.turn.user
        self.feedback = Feedback(self.documents)
        self.model = model_of(self.user)
        self.rules = self.feedback.rules()
        self.more = False
        self._looked = 0.0

    def run(self) -> None:
        """Learn what is to be learned, and say what came of it."""
        parked = not self.rules.enabled
        try:
            self._learn()
        except (LeftError, StoreError):  # where the store is away the claim runs out, and the turn comes later
            raise
        except ResourceError as error:
            log.warning("%s: no room to learn now: %s", self.namespace, error)
            self._tell_once("waits", f"Learning is tried again in {AGAIN:g} s: {error}")
            self.turn.again(AGAIN)
            return
        except Exception as error:
            known = isinstance(error, KilotuneError)
            if not known:
                log.exception("learning from feedback failed")
            self._tell("failed", without_user(str(error)) if known else f"an internal error ({type(error).__name__})")
            self.runner.count(failed=1)
            parked = True
        self.turn.end(self.more, parked)
        if parked and self.feedback.rules() != self.rules:  # they changed before it was parked
            wake(self.documents, self.user, 0)

    def _stay(self) -> None:
        """See that the turn is still to be run, and here; about once a second.

        Raises:
            LeftError: it is not to go on.

        """
        if self.claim.over:
            raise LeftError
        if time.monotonic() - self._looked >= 1.0:
            self._looked = time.monotonic()
            if not self.turn.mine():
                raise LeftError

    def _tell(self, what: str, message: str, **data: Any) -> None:
        tell(self.documents, self.user, what, message, data)

    def _tell_once(self, what: str, message: str) -> None:
        last = events(self.documents, self.user, limit=1)
        if not last or (last[0].data["type"], last[0].data["message"]) != (what, message):
            self._tell(what, message)

    # -- what is to be done --------------------------------------------------------------------------

    def _learn(self) -> None:
        rules = self.rules
        lessons = self.feedback.lessons(self.user)[:LESSONS]
        removed = self._take_back({mark_of(lesson) for lesson in lessons})
        if not rules.enabled:
            return
        taught, unread = read_lessons(lessons, self.runner.make, self.runner.guard.texts)
        self._skip(unread)
        on = None if rules.model is None else self.runner.adapters.settle(self.namespace, rules.model)
        plan = self._plan(taught, on, removed, self._aside(lessons))
        self.more = plan.more
        if plan.live is not None:
            self._told_of(plan.live, lessons)
        if plan.fresh:
            self._study(plan, lessons)
        self._watch(lessons)

    def _watch(self, lessons: Sequence[Lesson]) -> None:
        """See whether a shared adapter whose answers this user found bad has become worse for many."""
        bad = [shared_in(self.documents, one.model, one.version, one.on) for one in lessons if one.rating is False]
        names = {place[0] for place in bad if place is not None}
        moved = watch(self.documents, self.runner.adapters, self.runner.rule, names)
        self.runner.count(rolled_back=len(moved))

    def _take_back(self, standing: set[str]) -> bool:
        """Remove the versions that hold what does not stand any more; whether one of them was live."""
        adapters, live = self.runner.adapters, False
        named = adapters.aliases(self.namespace, self.model) if self._versions() else {}
        gone = [one for one in self._versions() if not marks_of(one) <= standing]
        for one in gone:
            adapters.rm(self.namespace, self.model, one.version, force=True)
            live = live or named.get(LIVE) == one.version
        if gone:
            numbers = [one.version for one in gone]
            told = f"{len(gone)} version(s) of your model held what was taken back, and were removed"
            self._tell("taken_back", told, versions=numbers, live=live)
            self.runner.count(taken_back=1)
            if self.runner.scopes is not None:
                self.runner.scopes.forget(self.namespace, self.model)
            self.documents.wipe()
        return live

    def _versions(self) -> list[Version]:
        return self.runner.adapters.versions(self.namespace, self.model)

    def _skip(self, unread: Sequence[Unread]) -> None:
        """Say of each lesson that makes no rows why, once."""
        known = set(self.turn.notes("skipped"))
        for one in unread:
            if one.mark not in known:
                self._tell("skipped", f"A {one.lesson.kind} cannot be learned: {one.why}", lessons=[one.lesson.name])
        self.turn.note("skipped", [one.mark for one in unread])

    def _aside(self, lessons: Sequence[Lesson]) -> set[str]:
        """The marks of what is set aside; not of what was given again after that."""
        names = set(self.turn.notes("aside"))
        return {mark_of(one) for one in lessons if one.name in names} - {
            mark_of(one) for one in lessons if one.name not in names
        }

    def _plan(self, taught: Sequence[Taught], on: SharedVersion | None, again: bool, aside: set[str]) -> _Plan:
        versions = {one.version: one for one in self._versions()}
        named = self.runner.adapters.aliases(self.namespace, self.model) if versions else {}
        live = versions.get(named.get(LIVE, 0))
        if live is not None and not _same(live.stands_on, on):
            live, again = None, True
        held = set() if live is None else marks_of(live)
        valid = current(taught)
        fresh = [one for one in valid if one.mark not in held and one.mark not in aside]
        known = [one for one in valid if one.mark in held]
        return _Plan(live, on, fresh[:AT_A_TIME], known, held, again, len(fresh) > AT_A_TIME)

    def _told_of(self, live: Version, lessons: Sequence[Lesson]) -> None:
        """Say what was published by a run that was killed before it could."""
        told = {one.data["data"].get("version") for one in events(self.documents, self.user, limit=100)}
        if live.version not in told and live.version not in self.turn.notes("told"):
            self._say_learned(live, [one.name for one in lessons if mark_of(one) in marks_of(live)])

    # -- learning --------------------------------------------------------------------------------------

    def _study(self, plan: _Plan, lessons: Sequence[Lesson]) -> None:
        runner, learner = self.runner, self.runner.learner
        guard = runner.guard.over(self.namespace, plan.on, self._stay)
        model, config, gate = self._begin(plan, guard)
        try:
            pace = runner.pace if self.rules.scope == "near" else runner.pace.everywhere()
            study = Study(learner, model, config, plan.fresh, plan.known, guard, pace, self._stay, gate.known)
            try:
                study.run()
                verdict = gate.judge()
            except UnsupportedError as error:  # a loss or a gradient that is not finite
                verdict = Verdict((f"it cannot be learned: {error}",), {})
            contents = learner.submit(model, Save()).result()
        finally:
            learner.close(model)
        self._publish(plan, study, verdict, contents, lessons)

    def _begin(self, plan: _Plan, guard: Guarded) -> tuple[str, AdapterConfig, Gate]:
        """A model in training as it is live, what its adapter is, and what judges it."""
        runner, learner, live = self.runner, self.runner.learner, plan.live
        record = None if live is None else runner.adapters.stored(self.namespace, live)
        config = runner.config if record is None else record.file().config
        guard.ready(learner, self.namespace, runner.config, plan.on, self._stay)
        for megabytes in (KEPT_INPUTS, 0.0):  # a model that hands more than one tensor from block to block keeps none
            keep = KeptRows(megabytes, beneath=guard.inputs)
            model = f"learning-{uuid.uuid4().hex}"
            learner.open(model, self.namespace, config, seed=self._seed(), on=plan.on, start=record, keep_inputs=keep)
            try:
                gate = Gate(learner, model, live is not None, plan.fresh, plan.known, guard, runner.bounds)
                return model, config, gate
            except BaseException as error:
                learner.close(model)
                if not megabytes or not isinstance(error, UnsupportedError):
                    raise
        raise AssertionError("the second one returned or raised")

    def _seed(self) -> int:
        """Of a new adapter's start."""
        words = json.dumps([self.namespace, self.user])
        return int(hashlib.sha256(words.encode()).hexdigest()[:8], 16)

    def _publish(self, plan: _Plan, study: Study, verdict: Verdict, contents: Any, lessons: Sequence[Lesson]) -> None:
        adapters = self.runner.adapters
        if not self._still(plan):
            self.turn.again(0)
            raise LeftError
        told: dict[str, Any] = {
            "lessons": packed(sorted(plan.held | {one.mark for one in plan.fresh})),
            "steps": study.steps,
            "gate": verdict.measured,
        }
        if not verdict.passed:
            told["refused"] = list(verdict.faults)
            version = self._keep(contents, plan.on, told)
            self._refuse(plan, verdict, version, lessons)
            self._clean()
            return
        checked = adapters.check(self.namespace, self.model, contents, plan.on)
        version, _ = adapters.keep(self.namespace, self.model, checked, metadata=told, alias=LIVE, on=plan.on)
        adapters.load(AdapterKey.of(self.namespace, version))
        names = [one.name for one in plan.fresh]
        self._say_learned(version, names, unsure=[one.name for one in study.unlearnt()])
        marks = {one.mark for one in plan.fresh}
        waited = [time.time() - one.created for one in lessons if one.kind == "correction" and mark_of(one) in marks]
        counts = {"lessons": len(names), "corrections": len(waited), "correction_seconds": sum(waited)}
        self.runner.count(learned=1, **counts)
        self._clean()

    def _still(self, plan: _Plan) -> bool:
        """Whether what was learned still stands, by the same rules, and what it went on from is still live."""
        rules = self.feedback.rules()
        before = self.rules
        if (rules.enabled, rules.model, rules.scope) != (before.enabled, before.model, before.scope):
            return False
        standing = {mark_of(one) for one in self.feedback.lessons(self.user)}
        if not plan.held | {one.mark for one in plan.fresh} <= standing or not self.turn.mine():
            return False
        named = self.runner.adapters.aliases(self.namespace, self.model) if self._versions() else {}
        return plan.live is None or named.get(LIVE) == plan.live.version

    def _keep(self, contents: Any, on: SharedVersion | None, told: dict[str, Any]) -> Version | None:
        """A refused candidate, where the store takes it: numbers that are not finite are no adapter."""
        try:
            checked = self.runner.adapters.check(self.namespace, self.model, contents, on)
            return self.runner.adapters.keep(self.namespace, self.model, checked, metadata=told, on=on)[0]
        except StoreError:
            raise
        except KilotuneError:
            return None

    def _refuse(self, plan: _Plan, verdict: Verdict, version: Version | None, lessons: Sequence[Lesson]) -> None:
        if plan.again:  # what was live once is tried again with whatever comes
            self.more = False
        else:
            marks, names = {one.mark for one in plan.fresh}, set(self.turn.notes("aside"))
            self.turn.note("aside", [one.name for one in lessons if one.name in names or mark_of(one) in marks])
        self._tell(
            "refused",
            f"What was learned from {len(plan.fresh)} new lesson(s) does not go live: {'; '.join(verdict.faults)}",
            version=None if version is None else version.version,
            lessons=[one.name for one in plan.fresh],
            gate=verdict.measured,
        )
        self.runner.count(refused=1)

    def _say_learned(self, version: Version, names: Sequence[str], unsure: Sequence[str] = ()) -> None:
        told = f"Version {version.version} of your model has learned {len(names)} lesson(s) and is live"
        if unsure:
            told += f"; {len(unsure)} of them it does not know for sure"
        gate, steps = version.metadata["gate"], version.metadata["steps"]
        self._tell(
            "learned", told, version=version.version, lessons=list(names), unsure=list(unsure), steps=steps, gate=gate
        )
        self.turn.note("told", [*self.turn.notes("told")[-TOLD:], version.version])

    def _clean(self) -> None:
        """Remove the oldest versions: of those that were refused, and of the others."""
        versions = self._versions()
        named = self.runner.adapters.aliases(self.namespace, self.model) if versions else {}
        refused = [one for one in versions if "refused" in one.metadata]
        others = [one for one in versions if "refused" not in one.metadata]
        for one in (*refused[:-KEPT], *others[:-KEPT]):
            if one.version not in named.values():
                try:
                    self.runner.adapters.rm(self.namespace, self.model, one.version)
                except AdapterError as error:  # something stands on it, or it was named just now
                    log.info("an old version stays: %s", error)


def _same(held: SharedVersion | None, on: SharedVersion | None) -> bool:
    if held is None or on is None:
        return held is on
    return not held.removed and held.sha256 == on.sha256
