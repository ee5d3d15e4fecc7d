"""What a stranger's schema or a call's arguments may hold: whatever it is, the answer is 200 or 400."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from kilotune.serve.http.json_values import json_fault
from tests.support.chat_tokenizers import byte_pairs
from tests.support.guided_support import TEMPLATES, Scripted, guided_serving

CHAT, RESPONSES, TOKENIZE = "/v1/chat/completions", "/v1/responses", "/tokenize"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "a cat"}], "max_tokens": 2}
OBJECT = {"type": "object"}


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}}
    return found


PARAMETERS: dict[str, tuple[Any, str]] = {
    "deep": (nested(400), "is more than 200 objects and lists deep"),
    "half a character": ({**OBJECT, "description": "\ud800"}, "holds half of a surrogate pair"),
    "half a character in a name": ({**OBJECT, "properties": {"\ud800": {}}}, "holds half of a surrogate pair"),
    "infinite": ({**OBJECT, "maximum": float("inf")}, "holds inf, which is no number of JSON"),
    "no number": ({**OBJECT, "maximum": float("nan")}, "holds nan, which is no number of JSON"),
    "a long name": ({**OBJECT, "properties": {"k" * 2000: {}}}, "has a name of 2,000 characters"),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    tokenizer = byte_pairs(TEMPLATES["hermes"])
    with (
        guided_serving(tmp_path_factory.mktemp("serve"), tokenizer, Scripted(tokenizer)) as made,
        made.client(made.keys["ann"]) as held,
    ):
        yield held


def post(client: httpx2.Client, path: str, body: Any) -> httpx2.Response:
    return client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_of_tools(client: httpx2.Client, case: str) -> None:
    parameters, said = PARAMETERS[case]
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    flat = {"type": "function", "name": "f", "parameters": parameters}
    for path, body in (
        (CHAT, {**ASKED, "tools": [tool]}),
        (CHAT, {**ASKED, "tools": [tool], "tool_choice": "required"}),
        (TOKENIZE, {"messages": ASKED["messages"], "tools": [tool]}),
        (RESPONSES, {"model": "tiny", "input": "a cat", "tools": [flat]}),
        (RESPONSES, {"model": "tiny", "input": "a cat", "tools": [flat], "stream": True}),
    ):
        answer = post(client, path, body)
        assert answer.status_code == 400, (path, answer.text)
        assert said in answer.json()["error"]["message"]
        assert "parameters" in answer.json()["error"]["param"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": NaN}', "holds nan"),
        *(
            ('{"a": ' + "[" * deep + "]" * deep + "}", "is more than 200 objects and lists deep")
            for deep in (800, *range(900, 1000, 6), 5000)  # as deep as Python's stack is, less what is on it
        ),
    ],
)
def test_arguments_of_calls(client: httpx2.Client, arguments: str, said: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [*ASKED["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]  # type: ignore[misc]
    answer = post(client, CHAT, {**ASKED, "messages": messages})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("own", [5, [1], {"lenient": True}, {"whitespace_pattern": "x"}])
def test_a_schema_sets_no_options_of_the_engine_that_holds_to_it(client: httpx2.Client, own: Any) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {**OBJECT, "x-guidance": own}}}
    answer = post(client, CHAT, {**ASKED, "tools": [tool], "tool_choice": "required"})
    assert answer.status_code < 500, answer.text


@pytest.mark.parametrize(("schema", "said"), PARAMETERS.values(), ids=PARAMETERS)
def test_schemas_of_answers(client: httpx2.Client, schema: Any, said: str) -> None:
    """Also those that no grammar process has seen: /v1/responses sends them back."""
    named = {"name": "x", "schema": schema}
    for path, asked, place in (
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": named}},
            "response_format.json_schema.schema",
        ),
        (CHAT, {"guided_json": schema}, "guided_json"),
        (CHAT, {"structured_outputs": {"json": schema}}, "structured_outputs.json"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", **named}}}, "text.format.schema"),
    ):
        body = {"model": "tiny", "input": "a cat"} if path == RESPONSES else ASKED
        answer = post(client, path, {**body, **asked})
        assert answer.status_code == 400, (path, answer.text)
        assert said in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == place


def test_what_json_has_is_taken() -> None:
    for value in (None, True, 1, 1.5, "é😀", [], {}, nested(60), {"a": [1, {"b": None}]}):
        assert json_fault(value) is None


def test_what_asks_for_nothing_beside_log_probabilities_and_streams(client: httpx2.Client) -> None:
    assert post(client, CHAT, {**ASKED, "top_logprobs": 0}).status_code == 200
    streamed = {**ASKED, "stream": True, "stream_options": {"continuous_usage_stats": False}}
    assert post(client, CHAT, streamed).status_code == 200
    assert post(client, CHAT, {**ASKED, "top_logprobs": 1}).status_code == 400


HALF = "\ud800"


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "description": HALF}}]}),
        (CHAT, {"metadata": {HALF: "a"}}),
        (CHAT, {"messages": [{"role": "user", "content": HALF}]}),
        (RESPONSES, {"tools": [{"type": "function", "name": "f", "description": HALF}]}),
        (RESPONSES, {"metadata": {HALF: "a"}}),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "description": HALF}}}),
        (RESPONSES, {"instructions": HALF}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_400_wherever_it_is(client: httpx2.Client, path: str, more: Any, stream: bool) -> None:
    body = {**ASKED, **more} if path == CHAT else {"model": "tiny", "input": "a cat", "max_output_tokens": 2, **more}
    answer = post(client, path, {**body, "stream": stream})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"
