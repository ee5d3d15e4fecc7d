"""The routes of learning against the API's own document, with files and jobs that are there; and strangers' files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from kilotune.serve.learning.jobs import JobLimits
from kilotune.serve.learning.training import TrainingLimits
from tests.serve.http.test_fuzz import CHECKS
from tests.support.http_support import BASE, Running
from tests.support.training_support import chat_lines, done, training_serving, upload

FEW = settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MANY = settings(FEW, max_examples=60)
JOBS = settings(FEW, max_examples=15)
METHODS = ["supervised", "dpo", "reinforcement"]
ROW = chat_lines([("the cat", "a dog")])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = TrainingLimits(jobs=JobLimits(open=10_000))
    with training_serving(tmp_path_factory.mktemp("fuzz"), limits=limits) as made:
        yield made


@pytest.mark.heavy
def test_nothing_that_the_document_allows_or_forbids_is_answered_wrongly(running: Running) -> None:
    ann = running.openai("ann")
    known = {"file_id": upload(ann, ROW).id}
    known["job_id"] = ann.fine_tuning.jobs.create(model=BASE, training_file=known["file_id"]).id
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    found = schema.include(path_regex="^/v1/(files|fine_tuning|feedback)|^/manage/.*(feedback|forget|users)")
    count, faults = 0, []
    for operation in found.get_all_operations():
        for mode in schemathesis.GenerationMode:
            cases = operation.ok().as_strategy(generation_mode=mode)
            try:
                given(cases)(FEW(lambda case: asked(case, running, known)))()
            except Unsatisfiable:
                continue
            except (Exception, BaseExceptionGroup) as error:
                faults.append(f"{operation.ok().label}, {mode}: {getattr(error, 'exceptions', error)}"[:1500])
            count += 1
    assert faults == [], "\n\n".join(faults)
    assert count >= 25


def asked(case: Any, running: Running, known: dict[str, str]) -> None:
    """Ask, mostly of what there is, and hold what comes against the document."""
    key = running.manager if case.path.startswith("/manage") else running.keys["ann"]
    for name, value in known.items():
        given_name = (case.path_parameters or {}).get(name)
        if isinstance(given_name, str) and len(given_name) % 2 and case.method != "DELETE":
            case.path_parameters[name] = value
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and 1 <= len(case.body["model"]) <= 400:
        case.body["model"] = BASE
        if isinstance(case.body.get("training_file"), str) and 1 <= len(case.body["training_file"]) <= 200:
            case.body["training_file"] = known["file_id"]
    case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, checks=CHECKS)


# -- graders and files of strangers -------------------------------------------------------------------

TEXTS = st.sampled_from(
    ["", "a", "{{ item.a }}", "{{ sample.output_text }}", "{{ sample.output_json.a[0] }}", "{{", "\ud800", "x" * 40_000,
     "{{ item.a.b }}" * 50, "eq", "rouge_l", "a + b", "a / 0", "9 ^ 9 ^ 9", "string_check", "text_similarity", "multi"]
)  # fmt: skip
VALUES = st.none() | st.booleans() | st.integers(-9, 9**30) | st.floats(allow_nan=False) | TEXTS
KEYS = st.sampled_from(
    ["type", "name", "input", "reference", "operation", "evaluation_metric", "graders", "calculate_output", "a", "b"]
)
INNER = st.recursive(VALUES, lambda more: st.lists(more, max_size=3) | st.dictionaries(KEYS, more, max_size=8))
CHECKED = st.fixed_dictionaries(
    {"type": st.just("string_check"), "name": TEXTS, "input": TEXTS, "reference": TEXTS,
     "operation": st.sampled_from(["eq", "ne", "like", "ilike"])}
)  # fmt: skip
LIKE = st.fixed_dictionaries(
    {"type": st.just("text_similarity"), "name": TEXTS, "input": TEXTS, "reference": TEXTS,
     "evaluation_metric": st.sampled_from(["bleu", "fuzzy_match", "rouge_2", "rouge_l", "cosine"])}
)  # fmt: skip
MULTI = st.fixed_dictionaries(
    {"type": st.just("multi"), "name": TEXTS, "calculate_output": TEXTS,
     "graders": st.dictionaries(st.sampled_from(["a", "b", "min", "x y"]), CHECKED | LIKE | INNER, max_size=3)}
)  # fmt: skip
GRADERS = CHECKED | LIKE | MULTI | st.dictionaries(KEYS, INNER, max_size=8)


@pytest.mark.heavy
def test_whatever_grader_is_tried_there_is_a_reward_or_a_reason(running: Running) -> None:
    found: list[int] = []

    @MANY
    @given(GRADERS, TEXTS, st.dictionaries(KEYS, INNER, max_size=3))
    def tries(grader: Any, sample: str, item: Any) -> None:
        body = {"grader": grader, "model_sample": sample, "item": item}
        for path, told in (("run", body), ("validate", {"grader": grader})):
            answer = client.post(
                f"/v1/fine_tuning/alpha/graders/{path}", content=json.dumps(told).encode(), headers=kind
            )
            found.append(answer.status_code)
            assert answer.status_code in (200, 400), (told, answer.text)

    kind = {"content-type": "application/json"}
    with running.client(running.keys["ann"]) as client:
        tries()
    assert found.count(200) > len(found) / 10


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "robot"])},
        optional={"content": VALUES | st.lists(INNER, max_size=2), "weight": VALUES, "tool_calls": INNER},
    ),
    max_size=4,
)  # fmt: skip
LINES = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES | INNER}, optional={"tools": INNER, "user": VALUES, "a": INNER}),
    st.fixed_dictionaries(
        {"input": st.fixed_dictionaries({"messages": MESSAGES}), "preferred_output": MESSAGES,
         "non_preferred_output": MESSAGES}
    ),
    INNER,
)  # fmt: skip


@pytest.mark.heavy
def test_whatever_file_is_trained_on_the_job_ends_and_says_why(running: Running) -> None:
    ann, grader = running.openai("ann"), {"type": "string_check", "name": "a", "operation": "like"}
    graded = {"grader": {**grader, "input": "{{ sample.output_text }}", "reference": "{{ item.a }}"}}
    ended: list[str] = []

    @JOBS
    @given(
        st.lists(LINES, min_size=1, max_size=3), st.sampled_from(["supervised", "dpo", "reinforcement"]), st.booleans()
    )
    def trains(lines: Any, method: str, good: bool) -> None:
        data = "\n".join(map(json.dumps, lines)).encode() + b"\n" + (ROW if good else b"")
        own = {**(graded if method == "reinforcement" else {}), "hyperparameters": {"n_epochs": 1}}
        try:
            file = upload(ann, data).id
            job = ann.fine_tuning.jobs.create(model=BASE, training_file=file, method={"type": method, method: own})
        except openai.BadRequestError:
            return
        job = done(ann, job)
        ended.append(job.status)
        if job.status == "failed":
            assert "internal error" not in job.error.message, (data, job.error.message)

    trains()
    assert "failed" in ended


def test_afterwards_jobs_are_as_ever(running: Running) -> None:
    ann = running.openai("ann")
    job = ann.fine_tuning.jobs.create(model=BASE, training_file=upload(ann, ROW).id)
    assert done(ann, job).status == "succeeded"
