"""Forgetting a person, in a service that trains: nothing of theirs is left, all else is as if they had never been."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from kilotune.errors import AdapterError
from kilotune.fleet.store import open_store
from kilotune.fleet.store.documents import Document, Documents
from kilotune.serve.engine.interface import AdapterKey
from kilotune.serve.learning.feedback import Answered, Feedback, Said
from kilotune.serve.learning.forgetting import FORGETTING, _Run
from kilotune.serve.learning.jobs import CHECKPOINTS, FILE, JOB, JobLimits
from kilotune.serve.learning.turns import LEARNING, turn_name, wake
from kilotune.serve.learning.users import model_of
from tests.support.http_support import BASE, Running
from tests.support.store_support import same
from tests.support.training_support import done, said, training_serving, upload

SECRET = "the heron nests on pole nine"
MIA, NOA = "mia-of-the-marsh", "noa"
PAIRS = [("a cat", "sat on"), ("a dog", "the mat"), ("the mat", "a dog")]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with training_serving(tmp_path) as found:
        yield found


def line(question: str, answer: str, **more: Any) -> bytes:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages, **more}).encode() + b"\n"


def lines(*theirs: bytes) -> bytes:
    """A company's file, some lines of which are a person's."""
    return b"".join([line(*PAIRS[0], user=NOA), *theirs, *(line(*pair) for pair in PAIRS[1:])])


def started(client: Any, data: bytes | str, model: str = BASE) -> Any:
    file = data if isinstance(data, str) else upload(client, data).id
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 2}}}
    return client.fine_tuning.jobs.create(model=model, training_file=file, method=method, seed=1)


def trained(client: Any, data: bytes | str, model: str = BASE) -> Any:
    job = done(client, started(client, data, model))
    assert job.status == "succeeded", job.error
    return job


def documents_of(running: Running) -> Documents:
    training = running.service.training
    assert training is not None
    return training.documents("ann")


def forgotten(running: Running, user: str = MIA, seconds: float = 60.0) -> Document:
    """After a person was forgotten: what is left of that."""
    training = running.service.training
    assert training is not None
    asked = training.forgetting.ask("ann", user)
    end = time.monotonic() + seconds
    while (found := documents_of(running).find(FORGETTING, asked.name)) is None or found.state != "done":
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def mine(documents: Documents, kind: str, name: str, user: str = MIA) -> None:
    """Let it have been made with a key of this person's."""
    documents.change(kind, name, lambda one: replace(one, data={**one.data, "user": user}))


def answered(feedback: Feedback, user: str, prompt: str) -> Document:
    """An answer that is kept."""
    messages = [{"role": "user", "content": prompt}]
    kept = feedback.keep(Answered(user=user, messages=messages, tools=None, text="?", model=BASE), 60)
    assert kept is not None
    return kept


def tensors(running: Running, model: str) -> Any:
    with open_store(running.catalogue.url, namespace="ann") as store:
        return store.get(model).tensors()


def everywhere(folder: Path, *needles: str) -> list[str]:
    """Which of these are in a file of the service's folder."""
    data = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return [needle for needle in needles if any(needle.encode() in one for one in data)]


def test_nothing_of_theirs_is_left_and_what_is_trained_again_never_saw_them(running: Running, tmp_path: Path) -> None:
    ann, documents = running.openai(), documents_of(running)
    before = said(ann, BASE, "a cat")
    theirs = [line("where is it?", SECRET, user=MIA), line("what is it?", "a heron", user=MIA)]
    house = trained(ann, lines(*theirs))
    above = trained(ann, lines(), house.fine_tuned_model)
    without = trained(ann, lines())
    above_it = trained(ann, lines(), without.fine_tuned_model)
    own = trained(ann, line("where is it?", SECRET))
    mine(documents, FILE, own.training_file)
    mine(documents, JOB, own.id)
    on_own = trained(ann, lines(), f"{own.fine_tuned_model}:ckpt-step-2")
    running.catalogue.roll_out("ann", "live", {house.fine_tuned_model: 1})
    record = running.catalogue.stored("ann", running.catalogue.info("ann", own.fine_tuned_model))
    running.catalogue.put("ann", model_of(MIA), record, alias="live")
    running.catalogue.put("ann", model_of(NOA), record, on=house.fine_tuned_model)
    feedback = Feedback(documents)
    kept = answered(feedback, MIA, SECRET)
    feedback.add(MIA, Said(answer=kept.name, correction=f"{SECRET}!"))
    assert not same(tensors(running, house.fine_tuned_model), tensors(running, without.fine_tuned_model))
    assert everywhere(tmp_path, SECRET, MIA) == [SECRET, MIA]
    training = running.service.training
    assert training is not None
    held = AdapterKey.of("ann", running.catalogue.info("ann", model_of(MIA)))
    assert training.answers(held, MIA, ["where is it?"])
    assert held in training._scopes._held

    left = forgotten(running)

    assert everywhere(tmp_path, SECRET, MIA) == []
    assert left.data["counts"] == {
        "files": 1, "files_cut": 1, "jobs": 1, "jobs_again": 3, "models": 12, "learned_again": 1, "broken": 0,
    }  # fmt: skip
    assert same(tensors(running, house.fine_tuned_model), tensors(running, without.fine_tuned_model))
    assert same(tensors(running, above.fine_tuned_model), tensors(running, above_it.fine_tuned_model))
    assert same(tensors(running, on_own.fine_tuned_model), tensors(running, without.fine_tuned_model))
    assert ann.files.content(house.training_file).content == lines()
    assert running.catalogue.aliases("ann", house.fine_tuned_model) == {"live": 1}
    assert ann.fine_tuning.jobs.retrieve(on_own.id).model == BASE
    for gone in (own.fine_tuned_model, model_of(MIA), model_of(NOA)):
        with pytest.raises(AdapterError, match="there is no adapter"):
            running.catalogue.info("ann", gone)
    with pytest.raises(openai.NotFoundError):
        ann.fine_tuning.jobs.retrieve(own.id)
    assert feedback.lessons(MIA) == []
    assert held not in training._scopes._held
    assert documents.find(LEARNING, turn_name("ann", NOA)) is not None
    assert said(ann, BASE, "a cat") == before


def test_a_job_that_runs_publishes_nothing_of_theirs(running: Running, tmp_path: Path) -> None:
    ann, documents = running.openai(), documents_of(running)
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}}
    file = upload(ann, line("where is it?", SECRET)).id
    mine(documents, FILE, file)
    jobs = [ann.fine_tuning.jobs.create(model=BASE, training_file=file, method=method, seed=n) for n in range(3)]
    end = time.monotonic() + 30
    while ann.fine_tuning.jobs.retrieve(jobs[0].id).status != "running":
        assert time.monotonic() < end
        time.sleep(0.02)
    forgotten(running)
    time.sleep(0.5)
    assert running.catalogue.ls("ann") == []
    assert ann.fine_tuning.jobs.list().data == []
    assert everywhere(tmp_path, SECRET, MIA) == []


@pytest.mark.heavy
def test_a_killed_run_goes_on(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is left once, as by a kill, before and after it."""
    ann = running.openai()
    house = trained(ann, lines(line("where is it?", SECRET, user=MIA)))
    without = trained(ann, lines())
    failed: list[str] = []
    steps = ("_cut", "_hold", "_remove", "_train_again", "_end")
    for name in steps:
        for late in (False, True):
            fail_once(monkeypatch, name, late, failed)
    monkeypatch.setattr("kilotune.serve.learning.workers.LEASE", 0.5)
    forgotten(running)
    assert failed[:9] == [name for name in steps for _ in range(2)][:9]  # by the last one it is done
    assert same(tensors(running, house.fine_tuned_model), tensors(running, without.fine_tuned_model))


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, late: bool, failed: list[str]) -> None:
    own = getattr(_Run, name)
    left = [True]

    def failing(run: _Run) -> None:
        if late:
            own(run)
        if left and left.pop():
            failed.append(name)
            raise ZeroDivisionError
        if not late:
            own(run)

    monkeypatch.setattr(_Run, name, failing)


def test_who_is_not_there_is_forgotten_at_once_and_others_stay(running: Running) -> None:
    ann, documents = running.openai(), documents_of(running)
    feedback = Feedback(documents)
    kept = answered(feedback, NOA, "hi")
    feedback.add(NOA, Said(answer=kept.name, rating=True))
    wake(documents, NOA, 1000.0)
    file = upload(ann, lines(line("where is it?", SECRET, user=NOA))).id
    left = forgotten(running)
    assert set(left.data["counts"].values()) == {0}
    assert len(feedback.lessons(NOA)) == 1
    assert documents.find(LEARNING, turn_name("ann", NOA)) is not None
    assert SECRET.encode() in ann.files.content(file).content
    assert MIA not in json.dumps(left.data)


def test_a_prompt_of_before_is_computed_again(running: Running) -> None:
    ann = running.openai()
    messages: Sequence[Any] = [{"role": "user", "content": "a cat sat on the mat and a dog " * 4}]

    def cached() -> int:
        answer = ann.chat.completions.create(model=BASE, messages=messages, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    cached()
    assert cached() > 0
    forgotten(running, "nobody")
    assert cached() == 0
    assert cached() > 0


def test_a_line_says_whose_it_is_however_it_is_written(running: Running) -> None:
    """Escaped letters, and accents apart from theirs."""
    ann = running.openai()
    theirs = [
        line("where is it?", SECRET, user="zoë").replace(b'"user"', b'"\\u0075ser"'),
        line("what is it?", SECRET, user="zoe\u0308"),
        line("who is it?", SECRET, user=" zoë "),
    ]
    file = upload(ann, lines(*theirs)).id
    assert forgotten(running, "zoë").data["counts"]["files_cut"] == 1
    assert ann.files.content(file).content == lines()


def test_what_is_begun_while_somebody_is_forgotten_goes_too(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that goes on from their model, a file of theirs, and feedback; between two looks."""
    ann, documents = running.openai(), documents_of(running)
    own = trained(ann, line("where is it?", SECRET))
    mine(documents, FILE, own.training_file)
    mine(documents, JOB, own.id)
    later: list[Any] = []
    real = _Run._hold

    def meanwhile(run: _Run) -> None:
        real(run)
        if later:
            return
        later.append(trained(ann, lines(), own.fine_tuned_model))
        file = upload(ann, line("where is it?", SECRET)).id
        mine(documents, FILE, file)
        feedback = Feedback(documents)
        feedback.add(MIA, Said(answer=answered(feedback, MIA, SECRET).name, correction=f"{SECRET}!"))
        wake(documents, MIA, 0.0)
        time.sleep(0.5)
        assert documents.find(LEARNING, turn_name("ann", MIA)).state == "held"  # type: ignore[union-attr]

    monkeypatch.setattr(_Run, "_hold", meanwhile)
    counts = forgotten(running).data["counts"]
    assert (counts["jobs"], counts["jobs_again"]) == (1, 1)
    assert everywhere(tmp_path, SECRET, MIA) == []
    without = trained(ann, lines())
    assert same(tensors(running, later[0].fine_tuned_model), tensors(running, without.fine_tuned_model))


def test_versions_behind_the_newest_are_looked_at(running: Running) -> None:
    ann, documents = running.openai(), documents_of(running)
    own = trained(ann, line("where is it?", SECRET))
    mine(documents, JOB, own.id)
    other = running.catalogue.stored("ann", running.catalogue.info("ann", trained(ann, lines()).fine_tuned_model))
    running.catalogue.put("ann", model_of(NOA), other, on=own.fine_tuned_model)
    running.catalogue.put("ann", model_of(NOA), other, alias="live")
    running.catalogue.put("ann", own.fine_tuned_model, other)
    counts = forgotten(running).data["counts"]
    assert (counts["models"], counts["learned_again"]) == (3, 1)
    for gone in (own.fine_tuned_model, model_of(NOA)):
        assert running.catalogue.versions("ann", gone) == []


@pytest.mark.heavy
def test_one_after_the_other_is_forgotten_and_asked_for_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = running.openai()
    house = trained(ann, lines(line("where is it?", SECRET, user=MIA), line("who is it?", "me", user="zoe")))
    running.catalogue.roll_out("ann", "live", {house.fine_tuned_model: 1})
    without = trained(ann, lines())
    training, order = running.service.training, []
    assert training is not None
    real = _Run._files

    def slow(run: _Run) -> Any:
        order.append(run.user)
        time.sleep(0.5)
        return real(run)

    monkeypatch.setattr(_Run, "_files", slow)
    asked = [training.forgetting.ask("ann", user).name for user in (MIA, "zoe", "zoe")]
    assert asked[1] == asked[2]
    end = time.monotonic() + 60
    while any(documents_of(running).find(FORGETTING, name).state != "done" for name in asked):  # type: ignore[union-attr]
        assert time.monotonic() < end
        time.sleep(0.05)
    assert order == [MIA, "zoe"]
    assert same(tensors(running, house.fine_tuned_model), tensors(running, without.fine_tuned_model))
    assert running.catalogue.aliases("ann", house.fine_tuned_model) == {"live": 1}


def test_what_nobody_wants_trained_is_not_trained_again(running: Running) -> None:
    """A cancelled job stays cancelled, a paused one paused, and a day's quota is not asked."""
    ann, documents = running.openai(), documents_of(running)
    data = lines(line("where is it?", SECRET, user=MIA))
    file = upload(ann, data).id
    house = trained(ann, file)
    jobs = {state: started(ann, file) for state in ("cancelled", "failed", "paused")}
    for state, job in jobs.items():
        done_with = {"error": {"code": "x", "message": "y", "param": None}} if state == "failed" else {}
        ann.fine_tuning.jobs.pause(job.id)
        documents.change(
            JOB, job.id, lambda one, to=state, more=done_with: replace(one, state=to, data={**one.data, **more})
        )  # type: ignore[misc]
    training = running.service.training
    assert training is not None
    training._runner._limits = JobLimits(tokens_a_day=1)
    assert forgotten(running).data["counts"]["jobs_again"] == 4
    states = {state: documents.find(JOB, job.id) for state, job in jobs.items()}
    assert {state: found.state for state, found in states.items() if found} == {state: state for state in jobs}
    assert states["failed"].data["error"]["code"] == "x"  # type: ignore[union-attr]
    assert [v.name for v in running.catalogue.ls("ann") if CHECKPOINTS not in v.name] == [house.fine_tuned_model]
    assert ann.fine_tuning.jobs.retrieve(house.id).status == "succeeded"
