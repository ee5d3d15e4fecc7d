"""What is told of a job while it runs, and kept for whoever goes on with it: events, numbers of steps, states, results.

Events of quick steps are kept back for a moment, so that one transaction writes several; what is kept takes them with
it. So of a server that dies those of its last moment may be missing: whoever goes on makes their steps again, and tells
them. Of a job that is cancelled they are not told any more.

Nothing is written of a job that is not this run's any more: cancelled, taken over, or one whose person was forgotten.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, final

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from ...fleet.stepper.operations import State
from ...fleet.store import Version
from ...fleet.store.documents import Document, Documents
from .jobs import CHECKPOINT, CHECKPOINTS, FILE, JOB, PAUSED, STATE, WAITING, Event, Jobs
from .workers import LeftError

__all__ = ["JobLog"]

T = TypeVar("T")
TOLD_EVERY = 2.0  # seconds for which events of steps are kept back, where steps are as quick
CURVE = {
    "step": "step",
    "train_loss": "training loss",
    "valid_loss": "validation loss",
    "train_mean_reward": "training reward",
    "valid_mean_reward": "validation reward",
}  # what is told of a step, and kept in the job's result file


@final
class JobLog:
    """Of one job.

    Attributes:
        curve: the numbers of its steps, for its result file.
        used: tokens that it has learned from.

    Args:
        documents: of its namespace.
        name: the job's.
        owner: whose it is, as long as this run goes on.

    """

    def __init__(self, documents: Documents, name: str, owner: str) -> None:
        self._documents, self._name, self._owner = documents, name, owner
        self.curve: list[dict[str, Any]] = []
        self.used = 0
        self._untold: list[Event] = []
        self._told = self._stepped = time.monotonic()

    def together(self, work: Callable[[Documents], T]) -> T:
        """Do something in one transaction, with the events that were kept back.

        Raises:
            LeftError: the job is not this run's any more, so nothing of it is done.

        """

        def both(own: Documents) -> T:
            if own.change(JOB, self._name, self._still) is None:  # nobody changes it meanwhile
                raise LeftError
            Jobs(own).tell_all(self._name, self._untold)
            return work(own)

        found = self._documents.together(both)
        self._untold, self._told = [], time.monotonic()
        return found

    def _still(self, job: Document) -> Document:
        """The job, if it is this run's, or was paused and has not been begun anew since."""
        paused = job.owner is None and job.state in (PAUSED, WAITING) and job.data["made"] is not None
        if job.owner != self._owner and not paused:
            raise LeftError
        return job

    def flush(self) -> None:
        """Write the events that were kept back long enough."""
        if self._untold and time.monotonic() - self._told > TOLD_EVERY:
            self.together(lambda own: None)

    def step(self, told: Mapping[str, Any], steps: int) -> None:
        """Tell the numbers of a step, of so many; once, however often it is made."""
        self.curve.append({key: value for key, value in told.items() if key in CURVE})
        known = ", ".join(f"{CURVE[key]}={told[key]:.4f}" for key in CURVE if key != "step" and key in told)
        text = f"Step {told['step']}/{steps}: {known}"
        self._untold.append(Event(text, data={**told, "total_steps": steps}, once=str(told["step"])))
        slow = time.monotonic() - self._stepped > TOLD_EVERY
        self._stepped = time.monotonic()
        if slow:
            self.together(lambda own: None)
        else:
            self.flush()

    # -- to go on from ----------------------------------------------------------------------------

    def keep(self, state: State) -> None:
        """Keep what there is, for whoever goes on, in place of what was kept before."""
        body = save_tensors({name: tensor.contiguous() for name, tensor in state.tensors.items()})
        told = {"step": state.step, "pieces": state.pieces, "curve": self.curve, "used": self.used}

        def work(own: Documents) -> None:
            Jobs(own).forget_states(self._name, erased=False)
            own.add(STATE, told, parent=self._name, body=[body])

        self.together(work)

    def keep_told(self) -> None:
        """Keep what is to be told of the job at its end, for whoever finds its model published."""
        told = {"curve": self.curve, "used": self.used}
        self.together(lambda own: own.add(STATE, told, parent=self._name))

    def kept(self) -> State | None:
        """What an earlier run has kept to go on from."""
        found = [one for one in self._states() if one.size]
        if not found:
            return None
        self._take_up(found[0])
        data = b"".join(self._documents.body(STATE, found[0].name))
        return State(found[0].data["step"], found[0].data["pieces"], load_tensors(data))

    def remember(self) -> None:
        """Take up what an earlier run has kept of what is to be told."""
        for one in self._states()[:1]:
            self._take_up(one)

    def _states(self) -> Sequence[Document]:
        """The newest first."""
        return self._documents.ls(STATE, parent=self._name, newest=True)

    def _take_up(self, state: Document) -> None:
        self.curve, self.used = list(state.data["curve"]), state.data["used"]

    # -- what comes of it -------------------------------------------------------------------------

    def checkpoint(self, own: Documents, version: Version, told: Mapping[str, Any]) -> None:
        """List a model that was published; once."""
        metrics = {key: value for key, value in told.items() if key in CURVE and key != "step"}
        kept = {"step": told.get("step", 0), "metrics": metrics, "model": version.name}

        def make(found: Document | None) -> Document:
            return found or Document(CHECKPOINT, "", "", kept, parent=self._name)

        which = version.name.partition(CHECKPOINTS)[2] or "last"
        own.put(CHECKPOINT, f"ftckpt-{self._name.partition('-')[2]}-{which}", make)

    def results(self, own: Documents, rewards: bool) -> list[str]:
        """The name of the file with the job's numbers, which is written once. rewards: it has such."""
        found = own.ls(FILE, parent=self._name)
        if not found and self.curve:
            text = io.StringIO()
            columns = [key for key in CURVE if rewards or "reward" not in key]
            writer = csv.DictWriter(text, columns, restval="")
            writer.writeheader()
            writer.writerows(self.curve)
            told = {"filename": "step_metrics.csv", "purpose": "fine-tune-results"}
            found = [own.add(FILE, told, parent=self._name, body=[text.getvalue().encode()])]
        return [one.name for one in found]
