"""What is kept of a job for whoever goes on with it: the numbers of the state that is gone on from, or of the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune.fleet.stepper.operations import State
from kilotune.fleet.store import open_store
from kilotune.fleet.store.documents import Document, Documents
from kilotune.serve.learning import job_log
from kilotune.serve.learning.job_log import JobLog
from kilotune.serve.learning.jobs import EVENT, JOB, STATE
from kilotune.serve.learning.workers import LeftError

KEPT = State(3, 4, {"values": torch.arange(5.0), "m": torch.ones(5), "v": torch.zeros(5)})


@pytest.fixture
def ann(tmp_path: Path) -> Iterator[Documents]:
    with open_store(f"sqlite:///{tmp_path / 'a.db'}") as store:
        yield Documents(store, "ann")


def begun(documents: Documents) -> str:
    """A job that this run has."""
    made = documents.add(JOB, {"made": {}}, prefix="ftjob", state="running")
    documents.change(JOB, made.name, lambda job: replace(job, owner="me"))
    return made.name


def told(step: int) -> dict[str, Any]:
    return {"step": step, "train_loss": 1.0 / step}


def test_who_goes_on_has_the_numbers_of_its_state_and_who_tells_the_end_all(ann: Documents) -> None:
    job = begun(ann)
    log = JobLog(ann, job, "me")
    for step in range(1, 6):
        log.step(told(step), 5)
        log.used += 10
        if step == 3:
            log.keep(KEPT)
    log.keep_told()
    on = JobLog(ann, job, "me")
    state = on.kept()
    assert state is not None
    assert (state.step, state.pieces, on.used) == (3, 4, 30)
    assert all(torch.equal(state.tensors[name], value) for name, value in KEPT.tensors.items())
    assert on.curve == [told(step) for step in range(1, 4)]
    end = JobLog(ann, job, "me")
    end.remember()
    assert end.curve == [told(step) for step in range(1, 6)]
    assert end.used == 50


def test_only_the_last_state_is_kept(ann: Documents) -> None:
    job = begun(ann)
    log = JobLog(ann, job, "me")
    for step in (1, 2):
        log.keep(KEPT._replace(step=step))
    log.keep_told()
    log.keep(KEPT)
    assert ann.total(STATE)[0] == 1
    state = log.kept()
    assert state is not None
    assert state.step == 3


def test_steps_are_told_once_and_are_there_with_what_is_kept(ann: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "TOLD_EVERY", 1e9)
    job = begun(ann)
    log = JobLog(ann, job, "me")
    log.step(told(1), 2)
    assert ann.total(EVENT)[0] == 0
    log.keep(KEPT)
    assert ann.total(EVENT)[0] == 1
    again = JobLog(ann, job, "me")
    again.step(told(1), 2)
    again.step(told(2), 2)
    again.keep_told()
    assert [one.data["data"]["step"] for one in ann.ls(EVENT, parent=job)] == [1, 2]


def test_events_come_at_once_where_steps_take_long(ann: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_log, "TOLD_EVERY", 0.0)
    job = begun(ann)
    JobLog(ann, job, "me").step(told(1), 2)
    assert ann.total(EVENT)[0] == 1


def test_events_are_not_kept_back_for_long(ann: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not behind a step that took long, and not before one."""
    now = [0.0]
    monkeypatch.setattr(job_log.time, "monotonic", lambda: now[0])
    log = JobLog(ann, begun(ann), "me")
    now[0] = 1.0
    log.step(told(1), 9)
    log.flush()
    assert ann.total(EVENT)[0] == 0
    now[0] = 2.1
    log.flush()
    assert ann.total(EVENT)[0] == 1
    now[0] = 60.0
    log.step(told(2), 9)
    assert ann.total(EVENT)[0] == 2


GONE: dict[str, Callable[[Document], Document]] = {
    "cancelled": lambda job: replace(job, state="cancelled", owner=None),
    "taken over": lambda job: replace(job, owner="another"),
    "held for forgetting": lambda job: replace(job, state="held", owner=None),
    "paused, and somebody forgotten": lambda job: replace(job, state="paused", owner=None, data={"made": None}),
    "the same, and resumed": lambda job: replace(job, state="queued", owner=None, data={"made": None}),
}


@pytest.mark.parametrize("what", [*GONE, "deleted"])
def test_of_a_job_that_is_not_this_runs_any_more_nothing_is_kept(what: str, ann: Documents) -> None:
    job = begun(ann)
    log = JobLog(ann, job, "me")
    log.step(told(1), 2)
    if what == "deleted":
        ann.rm(JOB, job)
    else:
        ann.change(JOB, job, GONE[what])
    for keep in (lambda: log.keep(KEPT), log.keep_told):
        with pytest.raises(LeftError):
            keep()
    assert log.kept() is None
    assert ann.total(STATE) == ann.total(EVENT) == (0, 0)


@pytest.mark.parametrize("state", ["paused", "queued"])
def test_of_a_job_that_was_paused_all_is_kept(state: str, ann: Documents) -> None:
    """It may be resumed already, as long as nobody has begun it anew."""
    job = begun(ann)
    log = JobLog(ann, job, "me")
    log.step(told(1), 2)
    ann.change(JOB, job, lambda found: replace(found, state=state, owner=None))
    log.keep(KEPT)
    assert ann.total(STATE)[0] == ann.total(EVENT)[0] == 1
