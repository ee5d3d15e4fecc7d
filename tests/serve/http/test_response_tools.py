"""Tools in ``/v1/responses``: those of chats, in OpenAI's newer shape."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.support.chat_tokenizers import byte_pairs
from tests.support.guided_support import TEMPLATES, Scripted, guided_serving, weather
from tests.support.http_support import Running

WEATHER: Any = {"type": "function", **weather()["function"]}
NOW: Any = {"type": "function", "name": "now"}
CALLS = [("weather", '{"city": "Bern", "days": 1}'), ("now", "{}")]
SAID = {
    "hermes": 'I see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Bern", "days": 1}}; {"name": "now", "parameters": {}}',
}
FORMS = [*TEMPLATES]


@pytest.fixture(scope="module", params=FORMS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Running]]:
    """An engine that says what it is told to."""
    tokenizer = byte_pairs(TEMPLATES[request.param])
    with guided_serving(tmp_path_factory.mktemp("serve"), tokenizer, Scripted(tokenizer)) as made:
        yield request.param, made


@pytest.fixture(scope="module", params=FORMS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of the real engine."""
    with guided_serving(tmp_path_factory.mktemp("serve"), byte_pairs(TEMPLATES[request.param])) as made:
        yield made.openai()


class Nothing(BaseModel):
    """An object."""


def respond(client: Any, given: Any = "the weather in Bern", **more: Any) -> Any:
    asked = {"model": "tiny", "input": given, "tools": [WEATHER, NOW], "max_output_tokens": 300, **more}
    return client.responses.create(**asked)


def calls_of(made: Any) -> list[tuple[str, str]]:
    return [(item.name, item.arguments) for item in made.output if item.type == "function_call"]


def test_calls_are_items_of_the_output(told: tuple[str, Running]) -> None:
    form, running = told
    running.engine.says = SAID[form]
    made = respond(running.openai())
    assert calls_of(made) == CALLS
    assert made.output_text == ("I see." if form == "hermes" else "")
    assert [item.type for item in made.output] == [*(["message"] if form == "hermes" else []), *["function_call"] * 2]
    assert {item.status for item in made.output} == {made.status} == {"completed"}
    ids = [(item.id[:3], item.call_id) for item in made.output if item.type == "function_call"]
    assert all(kind == "fc_" and re.fullmatch("call_[0-9a-f]{24}", call) for kind, call in ids)
    assert [tool.name for tool in made.tools] == ["weather", "now"]
    assert (made.tool_choice, made.parallel_tool_calls) == ("auto", True)
    Response.model_validate(made.to_dict())
    alone = respond(running.openai(), parallel_tool_calls=False)
    assert calls_of(alone) == CALLS[:1]
    assert alone.parallel_tool_calls is False


def test_a_stream_has_the_events_of_each_item(told: tuple[str, Running]) -> None:
    form, running = told
    running.engine.says = SAID[form]
    events = list(respond(running.openai(), stream=True))
    kind: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for event in events:
        kind.validate_python(event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    message = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    message = [*message, "output_item.done"] if form == "hermes" else []
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [name for i, name in enumerate(kinds) if kinds[i - 1] != name or not name.endswith("delta")]
    assert once == ["created", "in_progress", *message, *call, *call, "completed"]
    last = events[-1].response
    assert calls_of(last) == CALLS
    for place, item in enumerate(last.output):
        own = [event for event in events if getattr(event, "output_index", None) == place]
        assert own[0].item.id == own[-1].item.id == item.id
        assert own[-1].item == item
        deltas = "".join(event.delta for event in own if event.type.endswith("delta"))
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)


def test_a_conversation_has_the_prompt_that_the_chat_has(told: tuple[str, Running]) -> None:
    form, running = told
    client = running.openai()
    running.engine.says = SAID[form]
    first = respond(client)
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
        if item.type == "function_call"
    ]
    running.engine.says = "It is sunny."
    asked: Any = {"role": "user", "content": "the weather in Bern"}
    for sent in (first.output, [item.to_dict() for item in first.output], [item.model_dump() for item in first.output]):
        made = respond(client, [asked, *sent, *results])
        assert (made.output_text, made.status) == ("It is sunny.", "completed")
        prompt = running.engine.asked[-1].prompt
        calls = [
            {"id": one["call_id"], "type": "function", "function": {"name": name, "arguments": arguments}}
            for one, (name, arguments) in zip(results, CALLS, strict=True)
        ]
        answer = {"role": "assistant", "content": first.output_text, "tool_calls": calls}
        tools = [{"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in (WEATHER, NOW)]
        back = [{"role": "tool", "tool_call_id": one["call_id"], "content": "sunny"} for one in results]
        client.chat.completions.create(model="tiny", messages=[asked, answer, *back], tools=tools, max_tokens=300)
        assert prompt == running.engine.asked[-1].prompt


def test_what_the_client_made_of_an_answer_is_sent_back(told: tuple[str, Running]) -> None:
    form, running = told
    client = running.openai()
    running.engine.says = SAID[form]
    tools: Any = [WEATHER, {**NOW, "strict": True}]
    first = client.responses.parse(model="tiny", input="the weather in Bern", tools=tools)
    calls = [item.model_dump() for item in first.output if item.type == "function_call"]
    assert calls[1]["parsed_arguments"] == {}
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"} for call in calls]
    running.engine.says = "{}"
    second = client.responses.parse(model="tiny", input="so", text_format=Nothing)
    (message,) = [item.model_dump() for item in second.output]
    assert message["content"][0]["parsed"] == {}
    assert respond(client, [*calls, *results, message, {"role": "user", "content": "so"}]).output_text == "{}"
    with pytest.raises(openai.BadRequestError, match=r"parsed_arguments: not served; taken is any object"):
        respond(client, [{**calls[0], "parsed_arguments": 1}, results[0]])


def test_what_is_no_call_is_text(told: tuple[str, Running]) -> None:
    form, running = told
    for said in (SAID[form].replace("weather", "rain").replace("now", "then"), "<tool_call>{", "{", ""):
        running.engine.says = said
        made = respond(running.openai())
        assert (made.output_text, [item.type for item in made.output]) == (said, ["message"])
        *_, last = respond(running.openai(), stream=True)
        assert (last.response.output_text, len(last.response.output)) == (said, 1)
    running.engine.says = SAID[form]
    assert respond(running.openai(), tool_choice="none").output_text == SAID[form]


def test_an_answer_that_must_be_a_call_is_one(client: Any) -> None:
    more: dict[str, Any] = {"max_output_tokens": 900, "extra_body": {"seed": 1}}
    named = respond(client, tool_choice={"type": "function", "name": "weather"}, **more)
    ((name, arguments),) = calls_of(named)
    assert name == "weather"
    assert {*json.loads(arguments)} == {"city", "days"}
    assert named.tool_choice.name == "weather"
    *_, last = respond(client, tool_choice={"type": "function", "name": "weather"}, stream=True, **more)
    assert calls_of(last.response) == [(name, arguments)]
    cut = respond(client, tool_choice="required", tools=[WEATHER], max_output_tokens=12)
    assert (cut.status, cut.output[-1].status) == ("incomplete", "incomplete")


@pytest.mark.parametrize(
    ("more", "param", "told"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools", "'weather' is there twice"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name", "match pattern"),
        ({"tools": [{**WEATHER, "parameters": {"type": "array"}}]}, "tools[0].parameters", "type: expected 'object'"),
        ({"tools": [{**WEATHER, "parameters": {"properties": {"a": {"type": "strng"}}}}], "tool_choice": "required"},
         "tools[0].parameters.properties.a.type", "no JSON schema"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].name", "there is no such option"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "not served"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": {"type": "function", "name": "rain"}}, "tool_choice", "there is no tool 'rain'"),
        ({"include": ["message.output_text.logprobs"]}, "include", "not together with tools"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "now", "arguments": '{"a": NaN}'}]},
         "input[0].arguments", "no number of JSON"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "is missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client: Any, more: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, **more)
    assert told in refused.value.message
    assert refused.value.param == param
