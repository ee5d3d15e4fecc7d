"""What runs jobs: a few threads, each with one job at a time, which the learner mixes in its passes.

A job that a server has taken is its own for as long as it gives signs of life; then another server goes on with it,
from the last state that was kept. What a job draws is drawn from its seed alone, so what it comes to does not depend on
who runs it, nor on how often it was stopped. Its model has a name of its own: published once, however often its end is
run.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, final

from ...config import AdapterConfig
from ...errors import AdapterError, KilotuneError, StoreError
from ...fleet.stepper.operations import Forward, ForwardBackward, Keep, OptimStep, Save, Scored, State
from ...fleet.store import Record, SharedVersion, Version
from ...fleet.store.documents import Document, Documents
from ..engine.tenant_adapters import AdapterRegistry
from .feedback import ANSWER
from .job_log import JobLog
from .jobs import CHECKPOINTS, DONE, FILE, JOB, OPEN, RUNNING, Event, JobLimits, Jobs, model_name
from .learner import Learner, NoRoomError
from .reinforcement import EndedError, Lesson, Practice
from .schedule import Plan
from .training_file import Example, TrainingFile
from .users import without_user
from .workers import Claim, LeftError, Workers

__all__ = ["JobRunner", "ModelStart", "Reader"]

T = TypeVar("T")
Reader = Callable[[bytes, str, str, str, Callable[[], object]], TrainingFile]
"""(a file's bytes, of which form its lines are, what to call it, whose it is, what is called between pieces) -> it."""
KEPT_EVERY = 30.0  # seconds of training between states that are kept
TOLD = 50  # events with metrics of a job, about
WAIT = 0.5  # seconds between looks whether there is room for a model
FORWARD = 16  # rows of which a reference's log-probabilities are asked for at once
log = logging.getLogger("kilotune.serve")


@final
@dataclass(frozen=True)
class ModelStart:
    """What a job's model goes on from: what it stands on, and an adapter of its configuration."""

    config: AdapterConfig
    on: SharedVersion | None = None
    start: Record | None = None


@final
class JobRunner:
    """Runs the jobs of a store.

    Attributes:
        open: jobs of all servers that are not done, by state, as of some seconds ago.
        ended: jobs that were ended here, by state.

    Args:
        documents: of all namespaces.
        learner: trains.
        adapters: where models are published.
        base: what requests call the base.
        config: of the adapter of a job that begins with the base.
        read: reads a training file.
        limits: of each namespace.
        at_once: jobs that are trained at once here.

    """

    def __init__(
        self,
        documents: Documents,
        learner: Learner,
        adapters: AdapterRegistry,
        base: str,
        config: AdapterConfig,
        read: Reader,
        limits: JobLimits | None = None,
        at_once: int = 32,
    ) -> None:
        self._documents, self._learner, self._adapters = documents, learner, adapters
        self._base, self._config, self._read, self._limits = base, config, read, limits or JobLimits()
        self._workers = Workers(documents, JOB, self._work, at_once, beside=self._beside)
        self.open = dict.fromkeys(OPEN, 0)
        self.ended: Counter[str] = Counter()

    def start(self) -> None:
        """Begin to look for jobs."""
        self._workers.start()

    def _beside(self) -> None:
        """Remove what is kept for a time only, and count what is not done."""
        for kind in (FILE, ANSWER):
            self._documents.expire(kind)
        self.open = {state: self._documents.total(JOB, states=[state])[0] for state in OPEN}

    def stop(self) -> None:
        """Leave all jobs where they are; another server, or the next start, goes on with them."""
        self._workers.stop()

    def _work(self, claim: Claim) -> None:
        _Run(self, claim).run()

    # -- what a run asks for -----------------------------------------------------------------------

    def start_of(self, namespace: str, model: str) -> ModelStart:
        """What a job's ``model`` means: the base, a shared adapter to stand on, or an own one to go on from.

        Raises:
            AdapterError: there is none.

        """
        if model == self._base:
            return ModelStart(self._config)
        name, _, word = model.partition("/")
        which: Any = int(word) if word.isdecimal() else word or None
        try:
            info = self._adapters.info(namespace, name, which)
        except AdapterError:
            return ModelStart(self._config, on=self._adapters.settle(namespace, model))
        record = self._adapters.stored(namespace, info)
        return ModelStart(record.file().config, info.stands_on, record)

    def check_model(self, namespace: str, model: str) -> None:
        """See that a job can go on from a model.

        Raises:
            AdapterError: there is none. QuotaError: it takes more memory than a namespace may have.

        """
        self._learner.check_size(self.start_of(namespace, model).config, self._limits.memory)

    def read(self, namespace: str, file: str, form: str, stay: Callable[[], object]) -> TrainingFile:
        """A file that was uploaded.

        Raises:
            AdapterError: it was removed. ConfigError: it cannot be trained on.

        """
        own = self._documents.within(namespace)
        if own.find(FILE, file) is None:
            raise AdapterError(f"there is no file {file!r} any more")
        return self._read(b"".join(own.body(FILE, file)), form, file, namespace, stay)


@final
class _Run:
    """One job, from where it is to its end."""

    def __init__(self, runner: JobRunner, claim: Claim) -> None:
        self.runner, self.claim, self.job = runner, claim, claim.document
        job, self.asked = self.job, dict(self.job.data)
        self.documents = runner._documents.within(job.namespace)
        self.jobs, self.log = Jobs(self.documents, runner._limits), JobLog(self.documents, job.name, claim.owner)
        self.model = model_name(runner._base, job)
        self.open = f"{job.name}-{uuid.uuid4().hex[:8]}"  # in the learner, which may have an earlier run's still
        self._looked = 0.0
        self.start: ModelStart
        self.practice: Practice | None = None

    def run(self) -> None:
        """Train, publish, say what came of it."""
        try:
            version = self._published(self.model)
            if version is None:
                version = self._train()
            else:
                self.log.remember()
            self._succeed(version)
        except LeftError:
            raise
        except StoreError:  # it is away: the claim runs out, and the job goes on later
            raise
        except KilotuneError as error:
            self._fail(error)
        except Exception as error:
            log.exception("a job failed")
            self._fail(error)

    # -- signs of life ------------------------------------------------------------------------------

    def _stay(self, now: bool = False) -> None:
        """See that the job is still to be run, and here; about once a second, or now.

        Raises:
            LeftError: it is not to go on.

        """
        if self.claim.over:
            raise LeftError
        if not now and time.monotonic() - self._looked < 1.0:
            return
        self._looked = time.monotonic()
        job = self.documents.find(JOB, self.job.name)
        if job is None or job.state != RUNNING or job.owner != self.claim.owner:
            raise LeftError

    def _mine(self, own: Documents, change: Callable[[Document], Document]) -> None:
        """Change the job, as long as it is this run's."""

        def changed(job: Document) -> Document:
            if job.state != RUNNING or job.owner != self.claim.owner:
                raise LeftError
            return change(job)

        if own.change(JOB, self.job.name, changed) is None:
            raise LeftError

    # -- training -----------------------------------------------------------------------------------

    def _train(self) -> Version:
        asked = self.asked
        named = {"training": asked["training_file"], "validation": asked["validation_file"]}
        space, read = self.job.namespace, self.runner.read
        files = {what: read(space, file, asked["method"], self._stay) for what, file in named.items() if file}
        self._practise(files)
        self.start = start = self.runner.start_of(self.job.namespace, asked["model"])
        plan = Plan(files["training"].examples, asked, start.config)
        if asked["made"] is None:
            if not asked.get("again"):  # that somebody is forgotten is no wish of the namespace's to train more
                self.jobs.check_day(plan.tokens)
            self.log.together(lambda own: self._planned(own, plan))
        state = None if asked["made"] is None else self.log.kept()
        learner = self.runner._learner
        self._open(state)
        try:
            self._steps(plan, files, 0 if state is None else state.step)
            self.log.keep_told()
            try:
                return self._publish(self.model)
            except LeftError:
                self._keep_for_others()
                raise
        finally:
            learner.close(self.open)

    def _planned(self, own: Documents, plan: Plan) -> None:
        """Say what the job comes to."""
        more = {"made": plan.hyperparameters, "tokens": plan.tokens}
        Jobs(own).forget_states(self.job.name)  # of a run that was left when somebody was forgotten
        self._mine(own, lambda job: replace(job, data={**job.data, **more}))
        Jobs(own).tell(self.job.name, f"Files are valid; {len(plan.examples)} examples, {plan.steps} steps")

    def _open(self, state: State | None) -> None:
        """Begin with the model, as soon as its namespace's others leave room for it."""
        start, told = self.start, False
        while True:
            self._stay()
            try:
                self.runner._learner.open(
                    self.open,
                    self.job.namespace,
                    start.config,
                    seed=self.asked["seed"],
                    on=start.on,
                    start=start.start,
                    state=state,
                    most=self.runner._limits.memory,
                )
                return
            except NoRoomError as error:
                if not told:
                    self.jobs.tell(self.job.name, f"The job waits: {error}")
                told = True
                time.sleep(WAIT)

    def _steps(self, plan: Plan, files: dict[str, TrainingFile], first: int) -> None:
        learner, kept = self.runner._learner, time.monotonic()
        every = max(1, plan.steps // TOLD)
        for step in range(first, plan.steps):
            self._stay_or_keep()
            rows, divisor, told, tokens = self._lesson(plan, step)
            scored = learner.submit(self.open, ForwardBackward(rows, plan.objective, divisor))
            stepped = learner.submit(self.open, OptimStep(plan.adam(step)))
            found: Scored = scored.result()
            stepped.result()
            self.log.used += tokens
            told = {"step": step + 1, "train_loss": found.loss / max(found.weight, 1e-9), **told}
            ends = (step + 1) % plan.epoch_steps == 0
            validated = "validation" in files and plan.validates(step + 1)
            if validated:
                told |= self._validate(plan, files["validation"].examples, step)
            if (step + 1) % every == 0 or ends or validated or step == first:
                self.log.step(told, plan.steps)
            if ends and plan.keeps(step + 1):
                version = self._publish(f"{self.model}{CHECKPOINTS}{step + 1}")
                self.log.together(partial(self.log.checkpoint, version=version, told=told))
            if time.monotonic() - kept > KEPT_EVERY:
                self._keep()
                kept = time.monotonic()

    def _practise(self, files: dict[str, TrainingFile]) -> None:
        """Have what samples and grades, where the job learns from that."""
        asked = self.asked
        if asked["method"] != "reinforcement":
            return
        ends = files["training"].ends
        self.practice = Practice(self.runner._learner, self.open, asked["grader"], asked["seed"], ends)
        for what, file in files.items():
            self.practice.check(file, asked[f"{what}_file"])

    def _lesson(self, plan: Plan, step: int) -> Lesson:
        """What a step, from 0, learns from."""
        examples = plan.batch(step)
        if self.practice is None:
            return Lesson(self._rows(plan, examples), None, {}, sum(one.tokens for one in examples))
        return self._sampled(self.practice.lesson, examples, plan.group, step)

    def _sampled(self, ask: Callable[[Sequence[Example], int, int], T], some: Sequence[Example], n: int, at: int) -> T:
        try:
            return ask(some, n, at)
        except EndedError:  # so does the server
            self._keep()
            raise LeftError from None

    def _rows(self, plan: Plan, examples: Sequence[Example], without: bool = True) -> list[dict[str, Any]]:
        """Rows as the objective takes them; of pairs, with what the model says of them without the adapter."""
        rows = [row for example in examples for row in example.rows]
        if self.asked["method"] != "dpo":
            return rows
        asked = self.runner._learner.submit(self.open, Forward(rows, without=without))
        sums = [float(one.sum()) for one in asked.result().logprobs]
        return [{**row, "reference": total} for row, total in zip(rows, sums, strict=True)]

    def _validate(self, plan: Plan, examples: Sequence[Example], step: int) -> dict[str, float]:
        loss = weight = total = 0.0
        for begin in range(0, len(examples), FORWARD):
            self._stay()
            some = examples[begin : begin + FORWARD]
            if self.practice is not None:
                total += len(some) * self._sampled(self.practice.reward, some, self.asked["eval_samples"] or 1, step)
                continue
            rows = self._rows(plan, some)
            found: Scored = self.runner._learner.submit(self.open, Forward(rows, plan.objective)).result()
            loss, weight = loss + found.loss, weight + found.weight
        if self.practice is not None:
            return {"valid_mean_reward": total / len(examples)}
        return {"valid_loss": loss / max(weight, 1e-9)}

    def _stay_or_keep(self) -> None:
        try:
            self._stay()
        except LeftError:
            self._keep_for_others()
            raise
        self.log.flush()

    def _keep_for_others(self) -> None:
        """Keep what there is where somebody may go on."""
        job = self.documents.find(JOB, self.job.name)
        if job is not None and job.state not in DONE:
            self._keep()

    # -- what is kept -------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Keep what there is, for whoever goes on."""
        self.log.keep(self.runner._learner.submit(self.open, Keep()).result())

    # -- the end --------------------------------------------------------------------------------------

    def _published(self, name: str) -> Version | None:
        """What an earlier run of this job has published already."""
        if self.asked["made"] is None:  # none has come so far; what is kept here is kept once in any case
            return None
        try:
            return self.runner._adapters.info(self.job.namespace, name)
        except AdapterError:
            return None

    def _publish(self, name: str) -> Version:
        """Have the model, as it is now, answer by a name; once, however often this is run."""
        contents = self.runner._learner.submit(self.open, Save()).result()
        self._stay(now=True)
        if (there := self._published(name)) is not None:
            return there
        adapters, on = self.runner._adapters, self.start.on
        checked = adapters.check(self.job.namespace, name, contents, on)
        told = {"job": self.job.name, "model": self.asked["model"]}
        version, _ = adapters.keep(self.job.namespace, name, checked, metadata=told, on=on, first=True)
        return version

    def _succeed(self, version: Version) -> None:
        """Say what came of it, in one transaction: who sees it succeed sees the rest."""
        log, rewards = self.log, self.asked["method"] == "reinforcement"
        told = (
            Event(f"New fine-tuned model created: {version.name}", once="created"),
            Event("The job has successfully completed", once="completed"),
        )

        def end(own: Documents) -> None:
            log.checkpoint(own, version, log.curve[-1] if log.curve else {})
            more = {"finished": time.time(), "fine_tuned_model": version.name, "results": log.results(own, rewards)}
            if log.used:
                more["tokens"] = log.used
            self._end(own, "succeeded", more, told)

        log.together(end)
        self.runner.ended["succeeded"] += 1

    def _fail(self, error: Exception) -> None:
        text = (
            without_user(str(error))
            if isinstance(error, KilotuneError)
            else f"an internal error ({type(error).__name__})"
        )
        wrong = "invalid_training_file" if "cannot be trained on" in text else "training_failed"
        told = {"code": wrong, "message": text, "param": "training_file" if wrong != "training_failed" else None}
        more = {"finished": time.time(), "error": told}
        self._stay(now=True)

        event = Event(text, level="error", once="failed")
        self.log.together(lambda own: self._end(own, "failed", more, [event]))
        self.runner.ended["failed"] += 1

    def _end(self, own: Documents, state: str, more: Mapping[str, Any], told: Sequence[Event]) -> None:
        """Nobody works on it any more."""
        jobs = Jobs(own)
        jobs.tell_all(self.job.name, told)
        jobs.forget_states(self.job.name, erased=False)
        self._mine(own, lambda job: replace(job, state=state, owner=None, until=None, data={**job.data, **more}))
