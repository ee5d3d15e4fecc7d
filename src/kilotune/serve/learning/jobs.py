"""Fine-tuning jobs, as they are kept: what is asked for, what became of it, and who may change what.

::

    queued ─claim─► running ─► succeeded | failed
      ▲  ▲             │ │
      │  └──resume── paused ◄─pause        a server that dies loses its claim after a while: another one goes on
      └──────────────────┘
    cancel: from queued, running and paused

A job, its events and checkpoints are documents of the store's database, so they are there before the answer is sent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, final

from ...errors import AdapterError, ConfigError
from ...fleet.store.documents import Document, Documents, QuotaError

__all__ = [
    "CHECKPOINT",
    "CHECKPOINTS",
    "DONE",
    "EVENT",
    "FILE",
    "HELD",
    "JOB",
    "OPEN",
    "PAUSED",
    "RUNNING",
    "STATE",
    "WAITING",
    "Asked",
    "Event",
    "JobLimits",
    "Jobs",
    "model_name",
]

FILE, JOB, EVENT, CHECKPOINT, STATE = "file", "job", "event", "checkpoint", "jobstate"
WAITING, RUNNING, PAUSED = "queued", "running", "paused"
HELD = "held"  # until what it was trained on is forgotten; then it is trained again, or goes
OPEN = (WAITING, RUNNING, PAUSED, HELD)
DONE = ("succeeded", "failed", "cancelled")
CHECKPOINTS = ":ckpt-step-"  # behind a model's name, before the step
DAY = 86_400.0


@final
@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """What a namespace may have. open: jobs that are not done. tokens_a_day: that are trained. memory: bytes of those
    that are trained at once on a server."""

    open: int = 16
    tokens_a_day: int = 50_000_000
    memory: int = 2**32


@final
@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a job is asked to be.

    Args:
        model: what it is to go on from, as the request has it.
        method: "supervised", "dpo" or "reinforcement".
        epochs, batch_size, rate_multiplier, beta: None: "auto".
        grader: of reinforcement, as the request has it.
        compute_multiplier, eval_interval, eval_samples: of reinforcement; None: "auto".
        seed: of start, order and dropout; None: drawn.
        training_file, validation_file: names of files of the namespace.
        suffix: of the model's name.
        metadata: of the request.
        user: who asks, where that is one person.

    """

    model: str
    method: str
    training_file: str
    validation_file: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    rate_multiplier: float | None = None
    beta: float | None = None
    grader: Mapping[str, Any] | None = None
    compute_multiplier: float | None = None
    eval_interval: int | None = None
    eval_samples: int | None = None
    seed: int | None = None
    suffix: str | None = None
    metadata: Mapping[str, str] | None = None
    user: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a job keeps it."""
        seed = random.SystemRandom().randrange(2**31) if self.seed is None else self.seed
        told = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**told, "seed": seed, "made": None, "finished": None, "tokens": None, "error": None, "results": []}


def model_name(base: str, job: Document) -> str:
    """What a job's model is called, before it is there and after; base: what requests call it."""
    made: str | None = job.data.get("fine_tuned_model")
    short = job.name.rpartition("-")[2][:8]
    return made or f"ft:{base}:{job.namespace}:{job.data['suffix'] or ''}:{short}"


@final
@dataclass(frozen=True)
class Event:
    """What is told of a job. once: a word under which it is told once, however often."""

    message: str
    level: str = "info"
    data: Mapping[str, Any] | None = None
    once: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is kept."""
        kind = "message" if self.data is None or "step" not in self.data else "metrics"
        return {"level": self.level, "message": self.message, "type": kind, "data": dict(self.data or {})}


@final
class Jobs:
    """The jobs of one namespace. All methods wait for the store."""

    def __init__(self, documents: Documents, limits: JobLimits | None = None) -> None:
        self.documents, self.limits = documents, limits or JobLimits()

    def create(self, asked: Asked) -> Document:
        """A new job, which waits.

        Raises:
            AdapterError: there is no such file. ConfigError: a file is for something else. QuotaError: too many
                jobs are open, or too much was trained today.

        """
        for name, file in (("training_file", asked.training_file), ("validation_file", asked.validation_file)):
            if file is None:
                continue
            found = self.documents.find(FILE, file)
            if found is None:
                raise AdapterError(f"{name}: there is no file {file!r}")
            if found.data["purpose"] != "fine-tune":
                raise ConfigError(f"{name}: {file!r} is for {found.data['purpose']!r}; expected purpose 'fine-tune'")
        open_jobs, _ = self.documents.total(JOB, states=(WAITING, RUNNING, PAUSED))
        if open_jobs >= self.limits.open:
            raise QuotaError(f"{open_jobs} jobs are not done yet; at most {self.limits.open} may be open at once")
        self.check_day(0)

        def add(own: Documents) -> Document:
            made = own.add(JOB, asked.to_dict(), state=WAITING, prefix="ftjob")
            Jobs(own).tell(made.name, "Created fine-tuning job", data={"training_file": asked.training_file})
            return made

        return self.documents.together(add)

    def check_day(self, tokens: int) -> None:
        """Refuse what is more than a namespace may train in a day."""
        since = time.time() - DAY
        trained = 0
        for job in self.documents.ls(JOB, newest=True, limit=1000):
            if job.created < since:
                break
            trained += job.data["tokens"] or 0
        if trained + tokens > self.limits.tokens_a_day or (not tokens and trained >= self.limits.tokens_a_day):
            more = f" and {tokens} more are asked for" if tokens else ""
            raise QuotaError(
                f"{trained} tokens were trained within a day{more}; at most {self.limits.tokens_a_day} are allowed"
            )

    def find(self, name: str) -> Document:
        """A job.

        Raises:
            AdapterError: there is none of this namespace.

        """
        found = self.documents.find(JOB, name)
        if found is None:
            raise AdapterError(f"there is no fine-tuning job {name!r}")
        return found

    def cancel(self, name: str) -> Document:
        """End a job that is not done; see :meth:`find` and :meth:`_move` for what it raises."""
        made = self._move(name, (WAITING, RUNNING, PAUSED), "cancelled", "cancelled", finished=time.time())
        self.forget_states(name)
        self.tell(name, "The job was cancelled")
        return made

    def pause(self, name: str) -> Document:
        """Let a job wait until it is resumed; it keeps what it has learned."""
        made = self._move(name, (WAITING, RUNNING), PAUSED, "paused")
        self.tell(name, "The job was paused; it shows as queued until it is resumed")
        return made

    def resume(self, name: str) -> Document:
        """Let a paused job go on."""
        made = self._move(name, (PAUSED,), WAITING, "resumed")
        self.tell(name, "The job was resumed")
        return made

    def _move(self, name: str, of: Sequence[str], to: str, what: str, finished: float | None = None) -> Document:
        """Bring a job into another state.

        Raises:
            ConfigError: it cannot go there from where it is.

        """

        def change(job: Document) -> Document:
            if job.state not in of:
                raise ConfigError(f"job {name!r} is {job.state} and cannot be {what}; it would have to be one of {of}")
            return replace(job, state=to, owner=None, until=None, data={**job.data, "finished": finished})

        found = self.documents.change(JOB, name, change)
        if found is None:
            raise AdapterError(f"there is no fine-tuning job {name!r}")
        return found

    def tell(self, name: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        """An event of a job; nothing where it is gone."""
        self.tell_all(name, [Event(message, data=data)])

    def tell_all(self, name: str, events: Sequence[Event]) -> None:
        """Events of a job, in one transaction; nothing where it is gone."""

        def work(own: Documents) -> None:
            if own.find(JOB, name) is None:  # it was deleted meanwhile
                return
            for event in events:
                if event.once is None:
                    with suppress(AdapterError):  # just now
                        own.add(EVENT, event.to_dict(), parent=name, prefix="ftevent")
                else:
                    made = Document(EVENT, "", "", event.to_dict(), parent=name)
                    whole = f"ftevent-{name.partition('-')[2]}-{event.once}"
                    own.put(EVENT, whole, lambda found, made=made: found or made)  # type: ignore[misc]

        if events:
            self.documents.together(work)

    def clear(self, name: str, model: str, again: bool = True) -> None:
        """Let a job be as before its first step, with another model to begin with; what it made and told goes.

        again: it is trained again; else it stays cancelled, or failed.
        """
        for kind in (STATE, CHECKPOINT, EVENT, FILE):
            while found := self.documents.ls(kind, parent=name):
                for one in found:
                    self.documents.rm(kind, one.name)
        fresh: dict[str, Any] = {
            "made": None,
            "tokens": None,
            "results": [],
            "fine_tuned_model": None,
        }
        if again:
            fresh |= {"finished": None, "error": None, "again": True}
        self.documents.change(JOB, name, lambda job: replace(job, data={**job.data, **fresh, "model": model}))
        told = "What the job was trained on has changed: somebody was forgotten"
        self.tell(name, f"{told}; it is trained again" if again else told)

    def forget_states(self, name: str, erased: bool = True) -> None:
        """Remove what a job kept to go on from. erased: off the disk at once."""
        for state in self.documents.ls(STATE, parent=name):
            self.documents.rm(STATE, state.name, erased)
