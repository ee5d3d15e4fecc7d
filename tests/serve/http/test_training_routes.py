"""OpenAI's fine-tuning API, with its own client: from a file to a chat with what was learned."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from kilotune.errors import ConfigError
from kilotune.fleet.store.sqlite import SqliteStore
from kilotune.serve.http.keys import read_keys
from kilotune.serve.http.settings import ServeSettings
from kilotune.serve.learning.jobs import STATE, JobLimits
from kilotune.serve.learning.runner import _Run
from kilotune.serve.learning.training import TrainingLimits
from tests.support.cli_helpers import as_json, error
from tests.support.http_support import BASE, Running
from tests.support.training_support import CONFIG, chat_lines, done, said, training_serving, upload

HERS = [("the cat", "a dog sat"), ("a dog", "the mat")]
HIS = [("the cat", "on the hat"), ("a dog", "a cat sat")]
ANSWERED = {"input": "{{ sample.output_text }}", "reference": "{{ item.answer }}", "name": "like"}
LIKE = {**ANSWERED, "type": "text_similarity", "evaluation_metric": "fuzzy_match"}


def graded(grader: dict[str, Any], **hyper: Any) -> dict[str, Any]:
    """A job's method that learns from a grader."""
    return {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": hyper}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with training_serving(tmp_path_factory.mktemp("training")) as made:
        yield made


def job_of(client: Any, data: bytes, **more: Any) -> Any:
    hyper = {"n_epochs": 40, "batch_size": 2, "learning_rate_multiplier": 3.0}
    method = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
    file = upload(client, data)
    return client.fine_tuning.jobs.create(**{"model": BASE, "training_file": file.id, "method": method, **more})


# -- from a file to a chat -------------------------------------------------------------------------------


def test_two_tenants_teach_different_answers_to_one_question(running: Running) -> None:
    ann, bob = running.openai("ann"), running.openai("bob")
    before = said(ann, BASE, "the cat")
    jobs = [(ann, job_of(ann, chat_lines(HERS), seed=1)), (bob, job_of(bob, chat_lines(HIS), seed=1))]
    (hers, his) = (done(client, job) for client, job in jobs)
    assert (hers.status, his.status) == ("succeeded", "succeeded"), (hers.error, his.error)
    assert hers.fine_tuned_model.startswith(f"ft:{BASE}:ann::")
    assert said(ann, hers.fine_tuned_model, "the cat").strip() == "a dog sat"
    assert said(bob, his.fine_tuned_model, "the cat").strip() == "on the hat"
    assert said(ann, BASE, "the cat") == said(bob, BASE, "the cat") == before
    with pytest.raises(openai.NotFoundError):
        said(bob, hers.fine_tuned_model, "the cat")
    assert hers.trained_tokens > 0
    assert hers.finished_at >= hers.created_at
    assert hers.hyperparameters.n_epochs == 40
    names = [model.id for model in ann.models.list()]
    assert hers.fine_tuned_model in names


def test_a_job_tells_what_it_does_and_leaves_its_numbers(running: Running) -> None:
    ann = running.openai("ann")
    held = upload(ann, chat_lines(HERS), "valid.jsonl")
    job = done(ann, job_of(ann, chat_lines(HERS), validation_file=held.id, suffix="style", seed=2))
    assert job.status == "succeeded", job.error
    assert ":style:" in job.fine_tuned_model
    events = list(ann.fine_tuning.jobs.list_events(job.id, limit=3))  # pages of three
    messages = [event.message for event in reversed(events)]
    assert messages[0] == "Created fine-tuning job"
    assert messages[-1] == "The job has successfully completed"
    metrics = [event.data for event in events if event.type == "metrics"]
    assert metrics[0]["step"] == metrics[0]["total_steps"] == 40
    assert metrics[0]["train_loss"] < metrics[-1]["train_loss"]
    assert metrics[0]["valid_loss"] < metrics[-1]["valid_loss"]
    (result,) = job.result_files
    lines = ann.files.content(result).text.splitlines()
    assert lines[0] == "step,train_loss,valid_loss"
    assert lines[-1].startswith("40,")
    assert ann.fine_tuning.jobs.list(limit=1).data[0].id == job.id


def test_a_short_job_is_few_transactions(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a wait for the disk: of many jobs at once, 20 each were most of their time."""
    ann = running.openai("ann")
    file = upload(ann, chat_lines(HERS))
    made = Counter[str]()
    write = SqliteStore._write

    def counted(self: SqliteStore, work: Any, patient: bool = True) -> Any:
        made[threading.current_thread().name.rpartition("_")[0] or "other"] += 1
        return write(self, work, patient)

    monkeypatch.setattr(SqliteStore, "_write", counted)
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 1}}}
    job = done(ann, ann.fine_tuning.jobs.create(model=BASE, training_file=file.id, method=method))
    assert job.status == "succeeded", job.error
    events = [event.type for event in ann.fine_tuning.jobs.list_events(job.id)]
    assert events.count("metrics") == 8
    # Planned, what is told, the last model and its end; each of three epochs before: a model and its checkpoint; and
    # what is told every two seconds, where the machine is slow.
    assert 4 <= made["kilotune-job"] <= 14, made


def test_of_two_answers_the_better_one_is_learned(running: Running) -> None:
    ann = running.openai("ann")
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": "the cat"}]},
            "preferred_output": [{"role": "assistant", "content": "a mat"}],
            "non_preferred_output": [{"role": "assistant", "content": "the hat"}],
        }
    ] * 4
    data = "\n".join(map(json.dumps, pairs)).encode()
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 10, "batch_size": 2, "beta": 0.2}}}
    job = done(ann, job_of(ann, data, method=method))
    assert job.status == "succeeded", job.error
    assert job.method.dpo.hyperparameters.beta == 0.2
    losses = [e.data["train_loss"] for e in ann.fine_tuning.jobs.list_events(job.id) if e.type == "metrics"]
    assert losses[-1] == pytest.approx(0.6931, abs=1e-3)  # the first step: log 2
    assert losses[0] < 0.6


def test_the_last_model_is_gone_on_from(running: Running) -> None:
    bob = running.openai("bob")
    first = done(bob, job_of(bob, chat_lines(HIS), seed=1))
    second = done(bob, job_of(bob, chat_lines([("a mat", "on a cat")]), model=first.fine_tuned_model, seed=1))
    assert second.status == "succeeded", second.error
    assert said(bob, second.fine_tuned_model, "a mat").strip() == "on a cat"
    assert said(bob, first.fine_tuned_model, "the cat").strip() == "on the hat"


def test_what_is_trained_on_a_shared_one_stands_on_it(running: Running) -> None:
    from tests.support.http_support import adapter_folder

    running.catalogue.put("@shared", "house", adapter_folder(7))
    ann = running.openai("ann")
    job = done(ann, job_of(ann, chat_lines(HERS), model="house", seed=1))
    assert job.status == "succeeded", job.error
    stands = running.catalogue.info("ann", job.fine_tuned_model).stands_on
    assert stands is not None
    assert (stands.namespace, stands.name) == ("@shared", "house")
    assert said(ann, job.fine_tuned_model, "the cat").strip() == "a dog sat"


def test_the_last_epochs_answer_too_and_go_with_the_model(running: Running) -> None:
    bob = running.openai("bob")
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6, "batch_size": 1}}}
    job = done(bob, job_of(bob, chat_lines(HIS), method=method, seed=4))
    assert job.status == "succeeded", job.error
    found = list(bob.fine_tuning.jobs.checkpoints.list(job.id))
    names = [one.fine_tuned_model_checkpoint for one in found]
    model = job.fine_tuned_model
    assert names == [model, f"{model}:ckpt-step-10", f"{model}:ckpt-step-8"]
    assert [one.step_number for one in found] == [12, 10, 8]
    assert found[0].metrics.train_loss < found[2].metrics.train_loss
    assert len({running.catalogue.info("bob", name).sha256 for name in names}) == 3
    assert all(said(bob, name, "the cat") for name in names)
    with running.client(running.manager) as client:
        answer = client.delete(f"/manage/bob/adapters/{model}")
    assert answer.json() == {"name": model, "removed": 3}
    for name in names:
        with pytest.raises(openai.NotFoundError):
            said(bob, name, "the cat")


def test_what_a_grader_says_is_learned(running: Running) -> None:
    ann = running.openai("ann")
    rows = [{"messages": [{"role": "user", "content": asked}], "word": "cat"} for asked in ("the cat", "a dog")]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    held = upload(ann, data, "valid.jsonl")
    grader = {**ANSWERED, "type": "string_check", "operation": "like", "reference": "{{ item.word }}"}
    method = graded(grader, n_epochs=12, batch_size=2, learning_rate_multiplier=5.0, eval_interval=5)
    job = done(ann, job_of(ann, data, method=method, validation_file=held.id, seed=1))
    assert job.status == "succeeded", job.error
    assert job.method.reinforcement.grader.operation == "like"
    assert job.method.reinforcement.hyperparameters.compute_multiplier == 1
    told = [event.data for event in ann.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"][::-1]
    rewards = [one["train_mean_reward"] for one in told]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:2]) / 2 + 0.15, rewards
    assert [one["step"] for one in told if "valid_mean_reward" in one] == [5, 10]
    assert 0 < job.trained_tokens < 12 * 16 * 64
    lines = ann.files.content(job.result_files[0]).text.splitlines()
    assert lines[0] == "step,train_loss,valid_loss,train_mean_reward,valid_mean_reward"


def test_what_a_grader_needs_is_looked_for_in_each_line(running: Running) -> None:
    ann = running.openai("ann")
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "answer": "b"},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}], "answer": {"text": None}},
    ]
    told = []
    for some in (rows, [{**rows[0], "messages": [*rows[0]["messages"], {"role": "assistant", "content": "b"}]}]):
        job = done(ann, job_of(ann, "\n".join(map(json.dumps, some)).encode(), method=graded(LIKE)))
        assert (job.status, job.error.code) == ("failed", "invalid_training_file")
        told.append(job.error.message)
    assert "line 2: {{ item.answer }}: there is no such thing" in told[0]
    assert "line 1" not in told[0]
    assert "line 1: messages: the last one is the assistant's" in told[1]


# -- cancel, pause, resume ------------------------------------------------------------------------------


def slow_job(client: Any) -> Any:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}}
    return job_of(client, chat_lines(HERS * 40), method=method, seed=3)


def step_of(client: Any, job: Any) -> int:
    events = client.fine_tuning.jobs.list_events(job.id, limit=1).data
    return max((event.data.get("step", 0) for event in events), default=0)


def wait_for_steps(client: Any, job: Any) -> None:
    end = time.monotonic() + 60
    while not step_of(client, job):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_is_cancelled_and_nothing_is_published(running: Running) -> None:
    ann = running.openai("ann")
    job = slow_job(ann)
    wait_for_steps(ann, job)
    told = ann.fine_tuning.jobs.cancel(job.id)
    assert told.status == "cancelled"
    time.sleep(1.5)
    again = ann.fine_tuning.jobs.retrieve(job.id)
    assert (again.status, again.fine_tuned_model) == ("cancelled", None)
    with pytest.raises(openai.BadRequestError, match="is cancelled and cannot be cancelled"):
        ann.fine_tuning.jobs.cancel(job.id)


def test_a_paused_job_shows_as_queued_and_goes_on_where_it_was(running: Running) -> None:
    ann = running.openai("ann")
    job = slow_job(ann)
    wait_for_steps(ann, job)
    assert ann.fine_tuning.jobs.pause(job.id).status == "queued"
    time.sleep(2)
    reached = step_of(ann, job)
    time.sleep(1)
    assert step_of(ann, job) == reached
    assert ann.fine_tuning.jobs.resume(job.id).status == "queued"
    end = time.monotonic() + 60
    while (now := step_of(ann, job)) <= reached:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert now > reached  # not from its beginning
    ann.fine_tuning.jobs.cancel(job.id)


def test_what_was_learned_is_kept_where_a_job_is_paused_at_its_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last step and its model there is a while, where many are at work."""
    ann = running.openai("ann")
    jobs = running.service.training.jobs("ann")
    made: dict[str, list[int]] = defaultdict(list)  # by job: one that another test has cancelled may still make steps
    lesson, publish = _Run._lesson, _Run._publish

    def counted(self: _Run, plan: Any, step: int) -> Any:
        made[self.job.name].append(step)
        return lesson(self, plan, step)

    def paused(self: _Run, name: str) -> Any:
        if len(made[self.job.name]) == 8 and name == self.model:
            jobs.pause(self.job.name)
        return publish(self, name)

    monkeypatch.setattr(_Run, "_lesson", counted)
    monkeypatch.setattr(_Run, "_publish", paused)
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 1}}}
    file = upload(ann, chat_lines(HERS))
    job = ann.fine_tuning.jobs.create(model=BASE, training_file=file.id, method=method)
    until = time.monotonic() + 60
    while (found := jobs.find(job.id)).state != "paused" or jobs.documents.total(STATE, parent=job.id)[1] == 0:
        assert time.monotonic() < until, found
        time.sleep(0.02)
    made[job.id].append(-1)  # what comes now was learned before
    jobs.resume(job.id)
    assert done(ann, job).status == "succeeded"
    assert made[job.id] == [*range(8), -1]


def test_a_job_that_goes_on_counts_once_among_the_tokens_of_a_day(tmp_path: Path) -> None:
    with training_serving(tmp_path) as running:
        ann, training = running.openai("ann"), running.service.training
        assert training is not None
        job = slow_job(ann)
        wait_for_steps(ann, job)
        tokens = training.jobs("ann").find(job.id).data["tokens"]
        training._runner._limits = JobLimits(tokens_a_day=tokens + tokens // 2)
        ann.fine_tuning.jobs.pause(job.id)
        time.sleep(1.5)
        reached = step_of(ann, job)
        ann.fine_tuning.jobs.resume(job.id)
        end = time.monotonic() + 60
        while step_of(ann, job) <= reached:
            assert time.monotonic() < end
            assert ann.fine_tuning.jobs.retrieve(job.id).status != "failed"
            time.sleep(0.05)
        ann.fine_tuning.jobs.cancel(job.id)
        other = done(ann, slow_job(ann))
        assert (other.status, "tokens were trained within a day" in other.error.message) == ("failed", True)


# -- what is wrong ----------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_what_a_job_was_to_train_counts_once_however_often_it_goes_on(tmp_path: Path) -> None:
    with training_serving(tmp_path) as running:
        ann, training = running.openai("ann"), running.service.training
        assert training is not None
        hyper = {"n_epochs": 50, "batch_size": 1}
        job = job_of(ann, chat_lines(HERS), method={"type": "supervised", "supervised": {"hyperparameters": hyper}})
        end = time.monotonic() + 60
        while (tokens := training.jobs("ann").find(job.id).data["tokens"]) is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        ann.fine_tuning.jobs.pause(job.id)
        training._runner._limits = JobLimits(tokens_a_day=tokens + 1)
        job = done(ann, ann.fine_tuning.jobs.resume(job.id))
        assert job.status == "succeeded", job.error


def test_faults_of_a_file_are_told_by_line(running: Running) -> None:
    ann = running.openai("ann")
    lines = [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        "not json",
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "robot", "content": "a"}]}',
        '{"prompt": "a", "completion": "b"}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "user": 7}',
    ]
    job = done(ann, job_of(ann, "\n".join(lines).encode()))
    assert job.status == "failed"
    assert job.error.code == "invalid_training_file"
    told = job.error.message
    assert "line 2: no JSON" in told
    assert "line 3: messages: there is no assistant's message to learn" in told
    assert "line 4: messages[0].role: expected one of system" in told
    assert "line 5: expected messages, as supervised fine-tuning has them" in told
    assert "line 6: user: expected a text, whose line this is, got int" in told
    assert "line 1" not in told


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"training_file": "file-nothing"}, "training_file: there is no file 'file-nothing'"),
        ({"model": "nobody"}, "there is no such adapter"),
        ({"method": {"type": "grpo"}}, "method.type: 'grpo' is not served; taken are 'supervised', 'dpo'"),
        ({"method": {"type": "reinforcement"}}, "method.reinforcement: is missing; it has the grader"),
        ({"method": graded({"type": "python"})}, "method.reinforcement.grader.type: 'python' graders are not served"),
        ({"method": graded(LIKE, reasoning_effort="high")}, "method.reinforcement.hyperparameters.reasoning_effort"),
        ({"method": graded(LIKE, eval_interval=2)}, "eval_interval: no effect without validation_file"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"suffix": "a/b"}, "suffix"),
        ({"hyperparameters": {"n_epochs": 1}}, "hyperparameters: the old place"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changed: dict[str, Any], told: str, running: Running) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError), match=told.replace("[", r"\[")):
        job_of(running.openai("ann"), chat_lines(HERS), **changed)


def test_filters_that_are_not_there_are_refused(running: Running) -> None:
    with running.client(running.keys["ann"]) as client:
        for place in ("/v1/fine_tuning/jobs?metadata[a]=b", "/v1/files?limt=3"):
            answer = client.get(place)
            assert answer.status_code == 400
            assert "there is no such option" in answer.json()["error"]["message"]


def test_half_a_character_is_refused_wherever_it_is(running: Running) -> None:
    file = upload(running.openai("ann"), chat_lines(HERS)).id
    half, graders = {**LIKE, "reference": "\ud800"}, "/v1/fine_tuning/alpha/graders"
    asked = [
        ("/v1/fine_tuning/jobs", {"model": BASE, "training_file": file, "metadata": {"\ud800": "b"}}),
        ("/v1/fine_tuning/jobs", {"model": BASE, "training_file": file, "method": graded(half)}),
        (f"{graders}/run", {"grader": half, "model_sample": "x"}),
        (f"{graders}/run", {"grader": LIKE, "model_sample": "x", "item": {"answer": ["\udfff"]}}),
        (f"{graders}/validate", {"grader": {**LIKE, "\udfff": 1}}),
    ]
    with running.client(running.keys["ann"]) as client:
        for path, body in asked:
            answered = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answered.status_code == 400, (body, answered.text)
            assert "half of a surrogate pair" in answered.json()["error"]["message"]


def test_nobody_sees_or_touches_anothers(running: Running) -> None:
    ann, bob = running.openai("ann"), running.openai("bob")
    file = upload(ann, chat_lines(HERS))
    job = job_of(ann, chat_lines(HERS))
    attempts = [
        lambda: bob.files.retrieve(file.id),
        lambda: bob.files.content(file.id),
        lambda: bob.files.delete(file.id),
        lambda: bob.fine_tuning.jobs.retrieve(job.id),
        lambda: bob.fine_tuning.jobs.cancel(job.id),
        lambda: bob.fine_tuning.jobs.pause(job.id),
        lambda: bob.fine_tuning.jobs.list_events(job.id),
        lambda: bob.fine_tuning.jobs.checkpoints.list(job.id),
        lambda: bob.fine_tuning.jobs.create(model=BASE, training_file=file.id),
    ]
    for attempt in attempts:
        with pytest.raises(openai.NotFoundError):
            attempt()
    assert file.id not in {one.id for one in bob.files.list()}
    assert job.id not in {one.id for one in bob.fine_tuning.jobs.list()}
    done(ann, job)


# -- graders -----------------------------------------------------------------------------------------------


def test_graders_are_tried_and_checked_by_openais_client(running: Running) -> None:
    graders = running.openai("ann").fine_tuning.alpha.graders
    found = graders.run(grader=LIKE, model_sample="abc", item={"answer": "abcd"})
    assert found.reward == pytest.approx(6 / 7)
    assert (found.metadata.name, found.metadata.type, found.sub_rewards) == ("like", "text_similarity", {})
    same = {**ANSWERED, "type": "string_check", "operation": "eq"}
    both = {"type": "multi", "name": "both", "graders": {"a": same, "b": LIKE}, "calculate_output": "a + b"}
    found = graders.run(grader=both, model_sample="abcd", item={"answer": "abcd"})
    assert (found.reward, found.sub_rewards) == (2.0, {"a": 1.0, "b": 1.0})
    lacking = graders.run(grader=LIKE, model_sample="abc")
    assert (lacking.reward, lacking.metadata.errors.invalid_variable_error) == (0.0, True)
    assert graders.validate(grader=both).grader.calculate_output == "a + b"


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"type": "score_model"}, "'score_model' graders are not served"),
        ({"type": "python", "source": "x"}, "'python' graders are not served"),
        ({"evaluation_metric": "cosine"}, "'cosine' is not served; there are fuzzy_match"),
    ],
)
def test_graders_that_are_not_served_are_refused_by_name(changed: dict[str, Any], told: str, running: Running) -> None:
    graders = running.openai("ann").fine_tuning.alpha.graders
    for ask in (graders.validate, lambda grader: graders.run(grader=grader, model_sample="x")):
        with pytest.raises(openai.BadRequestError, match=told):
            ask(grader={**LIKE, **changed})
    with pytest.raises(openai.PermissionDeniedError):
        running.openai("carl").fine_tuning.alpha.graders.validate(grader=LIKE)


def test_training_is_a_permission_of_its_own(running: Running) -> None:
    carl = running.openai("carl")
    with pytest.raises(openai.PermissionDeniedError, match="kilotune keys add --trains"):
        upload(carl, chat_lines(HERS))
    with pytest.raises(openai.PermissionDeniedError):
        carl.fine_tuning.jobs.list()
    assert said(carl, BASE, "the cat")


def test_files_are_kept_listed_and_deleted(running: Running) -> None:
    ann = running.openai("ann")
    data = chat_lines(HERS)
    made = ann.files.create(
        file=("hers.jsonl", data), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert (made.filename, made.bytes, made.purpose, made.status) == ("hers.jsonl", len(data), "fine-tune", "processed")
    assert made.expires_at == made.created_at + 3600
    assert ann.files.content(made.id).read() == data
    assert next(iter(ann.files.list(limit=1))).id == made.id
    assert ann.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        ann.files.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match="purpose: 'batch' is not served"):
        ann.files.create(file=("a", b"x"), purpose="batch")


def test_what_training_does_is_counted(running: Running) -> None:
    def counted() -> dict[str, float]:
        with running.client(running.manager) as client:
            lines = client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    ann, before = running.openai("ann"), counted()
    assert done(ann, job_of(ann, chat_lines(HERS))).status == "succeeded"
    assert done(ann, job_of(ann, b"x")).status == "failed"
    after = counted()
    more = {
        name: after[name] - before[name] for name in after if name.startswith(("kilotune_training", "kilotune_jobs"))
    }
    assert more["kilotune_training_passes_total"] >= 40
    assert more["kilotune_training_tokens_total"] >= 40 * 2 * 8
    assert more["kilotune_training_seconds_total"] > 0
    assert more['kilotune_jobs_ended_total{state="succeeded"}'] == 1
    assert more['kilotune_jobs_ended_total{state="failed"}'] == 1
    states = {name.split('"')[1] for name in after if name.startswith("kilotune_jobs_open")}
    assert states == {"queued", "running", "paused", "held"}
    assert not [name for name in more if "ann" in name]


def test_quotas_of_files_and_jobs(tmp_path: Path) -> None:
    limits = TrainingLimits(file_bytes=1000, jobs=JobLimits(open=1))
    with training_serving(tmp_path, limits=limits) as running:
        ann = running.openai("ann")
        job = slow = ann.fine_tuning.jobs.create(
            model=BASE,
            training_file=upload(ann, chat_lines(HERS * 3)).id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}},
        )
        with pytest.raises(openai.RateLimitError, match="at most 1 may be open"):
            ann.fine_tuning.jobs.create(model=BASE, training_file=job.training_file)
        with pytest.raises(openai.RateLimitError, match="more than the 1000 allowed"):
            upload(ann, b"x" * 900)
        ann.fine_tuning.jobs.cancel(slow.id)


def test_the_memory_of_models_in_training_is_bounded(tmp_path: Path) -> None:
    with training_serving(tmp_path) as running:
        training = running.service.training
        assert training is not None
        size = training.learner._call(lambda: training.learner._stepper.bytes_of(CONFIG)).result()
        ann, short = running.openai("ann"), {"hyperparameters": {"n_epochs": 10, "batch_size": 1}}
        method = {"type": "supervised", "supervised": short}
        training._runner._limits = JobLimits(memory=size + 1)
        jobs = [job_of(ann, chat_lines(HERS), method=method) for _ in range(2)]
        assert [done(ann, job).status for job in jobs] == ["succeeded"] * 2
        told = [event.message for job in jobs for event in ann.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert sum(message.startswith("The job waits: the model takes ") for message in told) == 1
        training._runner._limits = JobLimits(memory=size - 1)
        with pytest.raises(openai.RateLimitError, match="train one of a smaller rank, or on fewer layers"):
            job_of(ann, chat_lines(HERS))


def test_without_learn_it_is_not_served_and_says_how(tmp_path: Path) -> None:
    from tests.support.http_support import serving

    with serving(tmp_path) as running, pytest.raises(openai.NotFoundError, match="kilotune serve with --learn"):
        running.openai("ann").files.list()


def test_what_says_how_to_learn_is_not_passed_over() -> None:
    with pytest.raises(ConfigError, match="learn_rank: has no effect without --learn") as told:
        ServeSettings(learn_rank=8, learn_share=0.5)
    assert "learn_share: has no effect without --learn" in str(told.value)
    assert ServeSettings(learn=True, learn_rank=8).learn_rank == 8


def test_keys_that_train_are_made_and_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    assert as_json("keys", "add", path, "--namespace", "ann", "--trains")["trains"] is True
    assert as_json("keys", "add", path, "--namespace", "bob")["trains"] is False
    assert [key.trains for key in read_keys(path)] == [True, False]
    refused = error("keys", "add", path, "--role", "manager", "--trains")
    assert "a manager's key trains nothing; leave --trains out" in refused
    document = json.loads(path.read_text())
    del document["keys"][1]["trains"]  # as an earlier version wrote it
    document["keys"][0]["trains"] = "yes"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="trains is neither true nor false"):
        read_keys(path)
    document["keys"][0]["trains"] = True
    path.write_text(json.dumps(document))
    assert [key.trains for key in read_keys(path)] == [True, False]
