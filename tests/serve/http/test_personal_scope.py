"""What a personal model answers: what is near what its user taught it, or everything, as its namespace's rules say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from kilotune.serve.learning.training import TrainingLimits
from tests.support.feedback_support import SPACE, call, correct, feedback_serving, rules, wait_for
from tests.support.http_support import BASE, Running, adapter_folder
from tests.support.learning_support import TOY, WIDE
from tests.support.training_support import said

TAUGHT, FAR = "the cat", "on a mat sat"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """ann and bob were taught one answer."""
    limits = TrainingLimits(pace=TOY, bounds=WIDE)
    with feedback_serving(tmp_path_factory.mktemp("scope"), limits=limits) as (made, _):
        made.catalogue.put(SPACE, "style", adapter_folder(4))
        rules(made, pause_seconds=0)
        for who in ("ann", "bob"):
            correct(made, who, TAUGHT, "a dog sat")
            wait_for(made, who, "learned")
        yield made


def answered(running: Running, who: str, questions: Sequence[str]) -> tuple[str, str, int | None]:
    """(what is answered to the last of several questions, what answered, its version)."""
    messages = [{"role": "user", "content": questions[0]}]
    for question in questions[1:]:
        messages += [{"role": "assistant", "content": "the hat"}, {"role": "user", "content": question}]
    body = {"model": "personal", "messages": messages, "max_tokens": 8, "temperature": 0}
    made = call(running, who, "POST", "/v1/chat/completions", json=body).json()["choices"][0]
    rated = call(running, who, "POST", "/v1/feedback", json={"answer": made["feedback_id"], "rating": "up"}).json()
    assert call(running, who, "DELETE", f"/v1/feedback/{rated['id']}").status_code == 200
    return made["message"]["content"].strip(), rated["model"], rated["version"]


def test_near_what_was_taught_it_is_its_own_and_else_what_is_beneath(running: Running) -> None:
    assert rules(running)["scope"] == "near"
    assert answered(running, "ann", [TAUGHT]) == ("a dog sat", "personal:ann", 1)
    plain = running.openai("plain")
    assert answered(running, "ann", [FAR]) == (said(plain, BASE, FAR).strip(), BASE, None)
    assert answered(running, "ann", [TAUGHT, FAR])[1:] == ("personal:ann", 1)  # the conversation is about it


def test_by_the_rules_it_answers_everything(running: Running) -> None:
    assert rules(running, scope="all")["scope"] == "all"
    for question in (TAUGHT, FAR):
        assert answered(running, "ann", [question])[1:] == ("personal:ann", 1)
    assert rules(running)["scope"] == "near"
    with running.client(running.manager) as manager:
        refused = manager.put(f"/manage/{SPACE}/feedback", json={"enabled": True, "scope": "some"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "scope")


def test_texts_and_responses_are_judged_too(running: Running) -> None:
    rules(running)
    plain = running.openai("plain")
    with running.client(running.keys["plain"]) as client:
        numbers = client.post("/tokenize", json={"prompt": FAR, "add_special_tokens": False}).json()["tokens"]

    def text(who: str, model: str, prompt: Any) -> str:
        client = running.openai(who)
        return client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0).choices[0].text

    for prompt in (FAR, numbers):
        assert text("ann", "personal", prompt) == text("plain", BASE, prompt)
    own = text("ann", "personal:ann", TAUGHT)
    assert text("ann", "personal", TAUGHT) == own != text("plain", BASE, TAUGHT)
    for prompt in ([TAUGHT, TAUGHT], [FAR, FAR]):
        assert text("ann", "personal", prompt) == text("ann", "personal", prompt[0])
    with pytest.raises(openai.BadRequestError, match="one by one"):
        text("ann", "personal", [TAUGHT, FAR])
    made = running.openai("ann").responses.create(model="personal", input=FAR, max_output_tokens=8, temperature=0)
    assert made.output_text == said(plain, BASE, FAR)


def test_a_conversation_without_a_user_is_judged_by_its_last_message(running: Running) -> None:
    rules(running)
    messages = [{"role": "system", "content": TAUGHT}]
    body = {"model": "personal", "messages": messages, "max_tokens": 8, "temperature": 0}
    made = call(running, "ann", "POST", "/v1/chat/completions", json=body).json()["choices"][0]
    plain = call(running, "ann", "POST", "/v1/chat/completions", json={**body, "model": "personal:ann"}).json()
    assert made["message"] == plain["choices"][0]["message"]


def test_by_its_own_name_it_answers_everything(running: Running) -> None:
    rules(running)
    ann = running.openai("ann")
    assert said(ann, "personal:ann/1", FAR) != said(ann, "personal", FAR)


def test_what_is_not_learned_yet_is_not_near(running: Running) -> None:
    rules(running)
    name = correct(running, "ann", FAR, "the hat")
    assert answered(running, "ann", [FAR])[1] == BASE  # not learned yet
    assert call(running, "ann", "DELETE", f"/v1/feedback/{name}").status_code == 200
    assert answered(running, "ann", [TAUGHT])[1] == "personal:ann"


def test_beneath_is_what_the_version_stands_on(running: Running) -> None:
    rules(running, pause_seconds=0, model="style")
    wait_for(running, "bob", "learned", 2)  # again, on top of that
    assert answered(running, "bob", [TAUGHT]) == ("a dog sat", "personal:bob", 2)
    assert answered(running, "bob", [FAR]) == (said(running.openai("plain"), "style", FAR).strip(), "style", 1)
