"""Options that ask for nothing, and those that are not served: by one table, which the docs have too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from kilotune.serve.http.options import ASKING, MESSAGE, RESPONSE, TEXT, Option
from kilotune.serve.http.schemas import ChatBody, CompletionBody
from tests.support.http_support import Running, serving
from tests.support.paths import ROOT

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a cat"}], "max_tokens": 1}
WORDS = {"any text": ["x"], "any object": [{}, {"a": 1}], "up to 16 texts by name": [{}, {"a": "b"}]}
WRONG: dict[str, list[Any]] = {
    "store": [True, 0, "false"],
    "metadata": [{"a": 1}, [], {str(i): "x" for i in range(17)}],
    "modalities": [["audio"], ["text", "audio"], [], "text"],
    "parallel_tool_calls": [1, "true"],
    "length_penalty": [0.9, "1", True],
    "echo": [True],
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("serve")) as made:
        yield made


@pytest.fixture(scope="module")
def ann(running: Running) -> Iterator[httpx2.Client]:
    with running.client(running.keys["ann"]) as client:
        yield client


def values(option: Option) -> list[Any]:
    """What the table says of it in words, as values."""
    return WORDS.get(option.told) or [json.loads(text) for text in re.findall("`([^`]*)`", option.told)]


@pytest.mark.parametrize("option", ASKING.values(), ids=lambda option: option.name)
def test_what_asks_for_nothing_is_taken_and_all_else_is_not_served(ann: httpx2.Client, option: Option) -> None:
    served = option.name in ChatBody.model_fields  # by chats, and not by completions
    asked = {"model": "tiny", "prompt": "a cat", "max_tokens": 1} if served else CHAT
    path = "/v1/completions" if served else "/v1/chat/completions"
    for value in [None, *values(option)]:
        answer = ann.post(path, json={**asked, option.name: value})
        assert answer.status_code == 200, answer.text
        assert ann.post("/v1/chat/completions", json={**CHAT, option.name: value}).status_code == 200
    for value in [*WRONG.get(option.name, []), {"what": "else"}, 7.5]:
        if option.name == "metadata" and value == {"what": "else"}:
            continue
        answer = ann.post(path, json={**asked, option.name: value})
        told = answer.json()["error"]
        assert (answer.status_code, told["param"], told["type"]) == (400, option.name, "invalid_request_error"), value
        assert f"{option.name}: not served; taken is " in told["message"]


@pytest.mark.parametrize("option", MESSAGE.values(), ids=lambda option: option.name)
def test_messages_come_back_as_they_were(ann: httpx2.Client, option: Option) -> None:
    def answer(value: Any) -> Any:
        message = {"role": "assistant", "content": "a dog", option.name: value}
        return ann.post("/v1/chat/completions", json={**CHAT, "messages": [*CHAT["messages"], message]})

    for value in [None, *values(option)]:
        assert answer(value).status_code == 200
    told = answer([{"id": "x"}]).json()["error"]
    assert told["param"] == f"messages[1].{option.name}"
    assert "not served" in told["message"]


def test_no_reasoning_is_nothing_that_is_asked_for(ann: httpx2.Client) -> None:
    """As vLLM's answers and clients of reasoning models have it; /v1/responses takes it, too."""
    message = {"role": "assistant", "content": "a dog", "reasoning": "", "reasoning_content": ""}
    body = {**CHAT, "messages": [*CHAT["messages"], message], "reasoning_effort": "none"}
    assert ann.post("/v1/chat/completions", json=body).status_code == 200
    told = ann.post("/v1/chat/completions", json={**CHAT, "reasoning_effort": "low"}).json()["error"]
    assert told["message"] == 'reasoning_effort: not served; taken is "none" or null'


def test_null_asks_for_nothing_whatever_its_name(ann: httpx2.Client) -> None:
    names = [*ChatBody.model_fields, "no_such_option"]
    body = {**dict.fromkeys(names), **CHAT}
    body["messages"] = [{"role": "user", "content": [{"type": "text", "text": "a cat", "cache_control": None}]}]
    assert ann.post("/v1/chat/completions", json=body).status_code == 200
    body = {**dict.fromkeys(CompletionBody.model_fields), "model": "tiny", "prompt": "a", "max_tokens": 1}
    assert ann.post("/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "refusal", "file", "video_url"])
def test_parts_that_are_no_texts_are_not_served_by_name(ann: httpx2.Client, kind: str) -> None:
    content = [{"type": "text", "text": "a cat"}, {"type": kind, kind: {"url": "data:,"}}]
    for role in ("user", "assistant"):
        answer = ann.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": role, "content": content}]})
        told = answer.json()["error"]
        assert (answer.status_code, told["param"]) == (400, "messages[0].content[1].type")
        assert told["message"] == f'messages[0].content[1].type: "{kind}" is not served; taken is "text"'


def test_special_tokens_are_as_each_request_has_them(ann: httpx2.Client) -> None:
    """A template writes them itself; a plain prompt begins as all texts do."""
    text = {"model": "tiny", "prompt": "a cat", "max_tokens": 1}
    assert ann.post("/v1/completions", json={**text, "add_special_tokens": True}).status_code == 200
    for path, body, value in (("completions", text, False), ("chat/completions", CHAT, True)):
        told = ann.post(f"/v1/{path}", json={**body, "add_special_tokens": value}).json()["error"]
        assert told["param"] == "add_special_tokens"
        assert "not served; taken is " in told["message"]


def test_top_k_of_all_is_no_top_k(running: Running, ann: httpx2.Client) -> None:
    for value in (-1, 0):
        assert ann.post("/v1/chat/completions", json={**CHAT, "top_k": value}).status_code == 200
        assert running.engine.asked[-1].sampling.top_k is None


@pytest.mark.parametrize(
    ("of", "options"),
    [("", ASKING), (" of `/v1/responses`", {**RESPONSE, **{f"text.{k}": v for k, v in TEXT.items()}})],
    ids=["texts", "responses"],
)
def test_the_docs_have_the_table(of: str, options: dict[str, Option]) -> None:
    docs = (ROOT / "docs" / "serve.md").read_text()
    head = f"| option{of} that is not served | asks for nothing at |\n|---|---|\n"
    listed = docs.partition(head)[2].partition("\n\n")[0]
    wanted = [f"| `{name}` | {option.told} |" for name, option in options.items() if option.told]
    never = ", ".join(f"`{name}`" for name, option in options.items() if not option.told)
    assert listed.splitlines() == [*wanted, f"| {never} | null alone |"]


def test_the_document_of_the_api_has_the_table(ann: httpx2.Client) -> None:
    schemas = ann.get("/openapi.json").json()["components"]["schemas"]
    for body in (ChatBody, CompletionBody):
        found = schemas[body.__name__]
        assert {*ASKING} <= {*found["properties"]}
        assert found["additionalProperties"] == {"type": "null"}
    assert schemas["ChatBody"]["properties"]["store"] == {
        "anyOf": [{"const": False, "type": "boolean"}, {"type": "null"}]
    }
