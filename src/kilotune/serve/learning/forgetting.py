"""Forgetting a person: all that is theirs goes, and what was trained on it is trained again without it.

::

    queued ─claim─► running:  files are cut ─► jobs stop ─► models go ─► jobs are trained again ─► done

Of a namespace one person is forgotten after the other: what one of them has trained again, the next one may not have.
What a step will do is written down before it begins, and a step may be done twice: who is killed goes on. What is
theirs: answers that were kept and what they said of them, their own model and what it learned, the files and jobs that
were made with their key, the lines of other files that name them (``"user": "ann"``), and every model that was trained
on any of that, or on such a model. A file of others loses those lines alone. A job of others is trained again, under
its name and with its seed: to what it would have come to if it had never seen them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, final

from ...adapter_files.names import composed
from ...fleet.store import Version
from ...fleet.store.documents import Document, Documents
from ..engine.tenant_adapters import AdapterRegistry
from .feedback import PERSON, Feedback
from .jobs import CHECKPOINTS, DONE, FILE, HELD, JOB, PAUSED, RUNNING, WAITING, Jobs, model_name
from .scope import Scopes
from .turns import LEARNING, turn_name, wake
from .users import PERSONAL, model_of
from .workers import Claim, LeftError, Workers

__all__ = ["FORGETTING", "Forgetting"]

FORGETTING = "forgetting"
PAGE = 200  # documents that are read at once
POLL = 0.1  # seconds between looks at what is waited for
AT_ONCE = 4
STAYING = (PAUSED, *(state for state in DONE if state != "succeeded"))  # jobs that nobody wants trained now


@final
class Forgetting:
    """What forgets people.

    Args:
        documents: of all namespaces.
        adapters: where models are published.
        base: what requests call the base.
        scopes: of personal models, here.

    """

    def __init__(self, documents: Documents, adapters: AdapterRegistry, base: str, scopes: Scopes) -> None:
        self._documents, self._adapters, self._base, self._scopes = documents, adapters, base, scopes
        self._workers = Workers(documents, FORGETTING, self._work, AT_ONCE)

    def start(self) -> None:
        """Begin to look for whom to forget."""
        self._workers.start()

    def stop(self) -> None:
        """Leave what is not done for the next start, or another server."""
        self._workers.stop()

    def ask(self, namespace: str, user: str) -> Document:
        """Have a person forgotten; the document tells how far that is, and in the end no more who it was.

        It is an earlier one, where that has not begun.
        """
        documents = self._documents.within(namespace)
        for one in documents.ls(FORGETTING, state=WAITING):
            if one.data["user"] == user:
                return one
        told: dict[str, Any] = {"user": user, "files": None, "jobs": None, "removed": False, "counts": {}}
        return documents.add(FORGETTING, told, state=WAITING, prefix="forget")

    def _work(self, claim: Claim) -> None:
        documents = self._documents.within(claim.document.namespace)
        _Run(documents, self._adapters, self._base, self._scopes, claim).run()


@final
class _Run:
    """One person, from where it is to its end."""

    def __init__(
        self, documents: Documents, adapters: AdapterRegistry, base: str, scopes: Scopes, claim: Claim
    ) -> None:
        self.documents, self.adapters, self.base, self.scopes = documents, adapters, base, scopes
        self.claim = claim
        self.told: dict[str, Any] = dict(claim.document.data)
        self.user: str = self.told["user"]
        self.namespace = claim.document.namespace

    def run(self) -> None:
        """Each step, with what it needs written down before it."""
        if self._others_first():
            return
        if self.told["files"] is None:
            self._note(files=self._files())
        if self.told["jobs"] is None:
            self._cut()
            self._note(jobs=self._jobs())
        if not self.told["removed"]:
            self._hold()
            self._remove()
            self._note(removed=True)
        self._train_again()
        self._end()

    def _others_first(self) -> bool:
        """Whether another one was asked for earlier; then this one waits, and whoever has it takes others."""
        found = [one for state in (RUNNING, WAITING) for one in self.documents.ls(FORGETTING, state=state, limit=1)]
        first = min((one.number for one in found), default=self.claim.document.number)
        if first < self.claim.document.number:
            until = time.time() + 1.0
            self._mine(lambda one: replace(one, state=WAITING, owner=None, until=until))
        return first < self.claim.document.number

    # -- what is theirs ----------------------------------------------------------------------------

    def _files(self) -> dict[str, list[str]]:
        """mine: their own files. cut: others' with lines of theirs."""
        found: dict[str, list[str]] = {"mine": [], "cut": []}
        for one in self._all(FILE):
            if one.parent:  # a result, which goes with its job
                continue
            if one.data.get("user") == self.user:
                found["mine"].append(one.name)
            elif any(self._theirs(line) for line in self._lines(one.name)):
                found["cut"].append(one.name)
        return found

    def _lines(self, file: str) -> Iterator[bytes]:
        rest = b""
        for piece in self.documents.body(FILE, file):
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
        if rest:
            yield rest

    def _theirs(self, line: bytes) -> bool:
        """Whether a line of a training file says that it is of this person."""
        if b'"user"' not in line and b"\\u" not in line:  # letters of a name may be escaped, too
            return False
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # no job is trained on it
            return False
        said = found.get("user") if isinstance(found, dict) else None
        return isinstance(said, str) and composed(said.strip()) == self.user

    def _jobs(self) -> dict[str, Any]:
        """gone: jobs that go. again: those that are trained again, and with what they begin then. states: of those that
        are not, or not now: they were cancelled, had failed, or are paused."""
        mine, cut = set(self.told["files"]["mine"]), set(self.told["files"]["cut"])
        mine |= {name for name in cut if not any(line.strip() for line in self._lines(name))}  # nothing is left
        starts = {model_of(self.user): self.base}  # a model that goes, or is made anew -> what begins in its place
        gone: list[str] = []
        again: dict[str, str] = {}
        states: dict[str, str] = {}
        for job in self._all(JOB):  # the oldest first: what a job begins with was there before it
            files, model = {job.data["training_file"], job.data["validation_file"]}, job.data["model"]
            start, made = model.partition("/")[0].partition(CHECKPOINTS)[0], model_name(self.base, job)
            if job.data.get("user") == self.user or files & mine:
                gone.append(job.name)
                starts[made] = starts.get(start, model)
            elif files & cut or start in starts:
                again[job.name] = starts.get(start, model)
                if job.state in STAYING:
                    states[job.name] = job.state
                starts[made] = made
        return {"gone": gone, "again": again, "states": states}

    # -- the steps ---------------------------------------------------------------------------------

    def _cut(self) -> None:
        """Nothing that begins to learn from now on finds anything of theirs."""
        self.documents.rm(PERSON, Feedback(self.documents).person(self.user))
        for name in self.told["files"]["mine"]:
            self.documents.rm(FILE, name)
        for name in self.told["files"]["cut"]:
            kept = [line + b"\n" for line in self._lines(name) if not self._theirs(line)]
            self.documents.refill(FILE, name, kept)
        files = self.told["files"]
        self._count(files=len(files["mine"]), files_cut=len(files["cut"]))

    def _hold(self) -> None:
        """Stop what runs, wherever it does, and wait until nobody can publish anything of it any more."""
        jobs = [(JOB, name) for name in (*self.told["jobs"]["gone"], *self.told["jobs"]["again"])]
        turn = turn_name(self.namespace, self.user)
        held = [*jobs, (LEARNING, turn)]

        def resting(one: Document | None) -> Document:
            data = {"user": self.user, "since": time.time(), "next": None}
            return replace(one or Document(LEARNING, "", "", data), state=HELD)

        self.documents.put(LEARNING, turn, resting)  # where there is none yet, none begins
        for kind, name in jobs:
            self.documents.change(kind, name, lambda one: replace(one, state=HELD))
        for kind, name in held:
            while (found := self.documents.find(kind, name)) is not None and found.owner is not None:
                if (found.until or 0.0) < time.time():  # whoever had it is dead
                    break
                self._wait()

    def _remove(self) -> None:
        """All that there is of them."""
        self._purge()
        while self._more():  # what was begun since it was looked for
            self._hold()
            self._purge()
        self.adapters.cache_words.forget(self.namespace)
        self.scopes.forget(self.namespace, model_of(self.user))
        feedback, jobs = Feedback(self.documents), self.told["jobs"]
        self.documents.rm(PERSON, feedback.person(self.user))
        self.documents.rm(LEARNING, turn_name(self.namespace, self.user))
        if feedback.ls(self.user, limit=1):  # given just now, while nobody could be woken
            wake(self.documents, self.user, 0.0)
        for name in jobs["gone"]:
            self.documents.rm(JOB, name)
        for name, start in jobs["again"].items():
            Jobs(self.documents).clear(name, start, jobs["states"].get(name) not in DONE)
        self._count(jobs=len(jobs["gone"]), jobs_again=len(jobs["again"]), models=len(jobs["models"]))
        self._count(learned_again=len(jobs["above"]), broken=len(jobs["broken"]))

    def _purge(self) -> None:
        """Models of their jobs, and of those that are trained again."""
        jobs = self.told["jobs"]
        if "models" not in jobs:
            before = {"models": {}, "above": [], "broken": [], **jobs.get("before", {})}
            found = self._models({*jobs["gone"], *jobs["again"]})
            lists = {key: sorted({*before[key], *found[key]}) for key in ("above", "broken")}
            self._note(jobs={**jobs, **lists, "models": {**found["models"], **before["models"]}})
            jobs = self.told["jobs"]
        self.adapters.purge(self.namespace, [model_of(self.user), *jobs["above"], *jobs["models"]])

    def _more(self) -> bool:
        """Whether there are files and jobs of theirs that were not there yet; they are written down."""
        known, jobs = self.told["files"], self.told["jobs"]
        fresh = [one.name for one in self._all(FILE) if not one.parent and one.data.get("user") == self.user]
        if fresh:
            self._note(files={**known, "mine": [*known["mine"], *fresh]})
            for name in fresh:
                self.documents.rm(FILE, name)
        found = self._jobs()
        if {*found["gone"], *found["again"]} <= {*jobs["gone"], *jobs["again"]}:
            return False
        gone = [*jobs["gone"], *(name for name in found["gone"] if name not in jobs["gone"])]
        fresh_again = {name: start for name, start in found["again"].items() if name not in jobs["again"]}
        again = {name: start for name, start in {**jobs["again"], **fresh_again}.items() if name not in gone}
        before = {key: jobs[key] for key in ("models", "above", "broken")}
        states = {**found["states"], **jobs["states"]}
        self._note(jobs={"gone": gone, "again": again, "states": states, "before": before})
        return True

    def _models(self, jobs: set[str]) -> dict[str, Any]:
        """models: of these jobs, with their aliases. above: others' own models that stand on one, and are learned anew.
        broken: what else stands on one, which was trained elsewhere and answers no more."""
        every = list(self._every_version())
        models = {v.name for v in every if v.metadata.get("job") in jobs}
        standing = {v.name for v in every if v.stands_on is not None and v.stands_on.name in models} - models
        above = sorted(name for name in standing if name.startswith(f"{PERSONAL}:"))
        models -= {model_of(self.user)}
        aliases = {name: sorted(self.adapters.aliases(self.namespace, name)) for name in sorted(models)}
        return {"models": aliases, "above": above, "broken": sorted(standing - set(above))}

    def _every_version(self) -> Iterator[Version]:
        """Of all adapters: an older one may be theirs, or stand on theirs, where the newest does not."""
        for newest in self.adapters.ls(self.namespace):
            yield from self.adapters.versions(self.namespace, newest.name) if newest.version > 1 else (newest,)

    def _train_again(self) -> None:
        """One after the other, since one may begin with another."""
        for name in self.told["jobs"]["again"]:
            to = self.told["jobs"]["states"].get(name, WAITING)
            self.documents.change(JOB, name, lambda job, to=to: _released(job, to))  # type: ignore[misc]
            while (found := self.documents.find(JOB, name)) is not None and found.state in (WAITING, RUNNING):
                self._wait()
            model = "" if found is None else found.data.get("fine_tuned_model") or ""
            for alias in self.told["jobs"]["models"].get(model, ()):
                self.adapters.roll_out(self.namespace, alias, {model: None})
        for name in self.told["jobs"]["above"]:
            wake(self.documents, name.removeprefix(f"{PERSONAL}:"), 0.0)

    def _end(self) -> None:
        """It is done, and who it was is written nowhere any more."""
        told = {"finished": time.time(), "counts": self.told["counts"]}
        self._mine(lambda one: replace(one, state="done", owner=None, until=None, data=told), erased=True)

    # -- inside ------------------------------------------------------------------------------------

    def _note(self, **told: Any) -> None:
        self.told |= told
        self._mine(lambda one: replace(one, data=self.told))

    def _count(self, **counts: int) -> None:
        self.told["counts"] = {**self.told["counts"], **counts}

    def _mine(self, change: Callable[[Document], Document], erased: bool = False) -> None:
        """Change the document, as long as it is this run's."""

        def own(one: Document) -> Document:
            if one.owner != self.claim.owner:
                raise LeftError
            return change(one)

        self.documents.change(FORGETTING, self.claim.document.name, own, erased=erased)

    def _all(self, kind: str) -> Iterator[Document]:
        after: str | None = None
        while page := self.documents.ls(kind, after=after, limit=PAGE):
            self._stay()
            yield from page
            after = page[-1].name

    def _wait(self) -> None:
        self._stay()
        time.sleep(POLL)

    def _stay(self) -> None:
        if self.claim.over:
            raise LeftError


def _released(job: Document, to: str) -> Document:
    return replace(job, state=to, owner=None, until=None) if job.state == HELD else job
