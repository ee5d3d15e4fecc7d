"""Tokens and texts by request, against the tokenizer itself."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from kilotune.serve.http.prompts import LONG
from tests.support.http_support import Running, prompt_ids, serving, tokenizer

MESSAGES = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "the"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("serve")) as made:
        yield made


@pytest.fixture(scope="module")
def ann(running: Running) -> Iterator[httpx2.Client]:
    with running.client(running.keys["ann"]) as client:
        yield client


def told(client: httpx2.Client, path: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


@pytest.mark.parametrize("text", ["the cat sat", "", "the cat " * LONG], ids=["short", "empty", "long"])
def test_a_text_and_its_tokens(running: Running, ann: httpx2.Client, text: str) -> None:
    made = told(ann, "/tokenize", model="poems", prompt=text, add_special_tokens=False)
    assert made["tokens"] == prompt_ids(text)
    assert (made["count"], made["max_model_len"]) == (len(made["tokens"]), running.engine.max_length)
    assert made["token_strs"] is None
    assert told(ann, "/detokenize", model="poems", tokens=made["tokens"])["prompt"] == tokenizer().decode(
        made["tokens"], clean_up_tokenization_spaces=False
    )


def test_a_prompt_has_the_tokens_that_a_completion_of_it_begins_with(running: Running, ann: httpx2.Client) -> None:
    made = told(ann, "/tokenize", prompt="the cat", return_token_strs=True)
    told(ann, "/v1/completions", model="tiny", prompt="the cat", max_tokens=1)
    assert tuple(made["tokens"]) == running.engine.asked[-1].prompt
    assert made["token_strs"] == tokenizer().convert_ids_to_tokens(made["tokens"])


@pytest.mark.parametrize(
    "more",
    [{}, {"add_generation_prompt": False}, {"add_generation_prompt": False, "continue_final_message": True}],
    ids=["asked", "closed", "continued"],
)
def test_messages_have_those_of_a_chat(running: Running, ann: httpx2.Client, more: dict[str, bool]) -> None:
    made = told(ann, "/tokenize", messages=MESSAGES, **more)
    told(ann, "/v1/chat/completions", model="tiny", messages=MESSAGES, max_tokens=1, **more)
    assert tuple(made["tokens"]) == running.engine.asked[-1].prompt
    text = tokenizer().apply_chat_template(MESSAGES, tokenize=False, **{"add_generation_prompt": True, **more})
    assert made["tokens"] == prompt_ids(text)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "continue_final_message": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/tokenize", {"promt": "a"}, 400, "promt"),
        ("/detokenize", {"tokens": [96]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "secret-plans"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_named(ann: httpx2.Client, path: str, body: dict[str, Any], status: int, param: str) -> None:
    assert told(ann, path, status, **body)["param"] == param


def test_the_version_is_for_who_has_a_key(running: Running, ann: httpx2.Client) -> None:
    assert ann.get("/version").json() == {"version": importlib.metadata.version("kilotune")}
    with running.client() as nobody:
        assert nobody.get("/version").status_code == 401
    assert told(ann, "/detokenize", tokens=[])["prompt"] == ""
