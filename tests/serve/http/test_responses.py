"""``/v1/responses`` as OpenAI's own client asks it, with the answers that chats have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.support.http_support import BASE, Running, batching, expected, prompt_ids, serving, tokenizer

TEXT = "a big red dog"
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder)) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return running.openai()


def rendered(*messages: tuple[str, str]) -> str:
    told = [{"role": role, "content": text} for role, text in messages]
    return str(tokenizer().apply_chat_template(told, tokenize=False, add_generation_prompt=True))


def respond(client: Any, given: Any = TEXT, model: str = "poems", tokens: int = 8, **more: Any) -> Any:
    return client.responses.create(model=model, input=given, max_output_tokens=tokens, temperature=0, **more)


def message(role: str, *texts: str, **more: Any) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"role": role, "content": [{"type": kind, "text": text} for text in texts], **more}


# -- whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "seed"), [(BASE, None), ("poems", 1), ("letters", 2)])
def test_a_text_is_answered_as_a_chat_is(client: Any, model: str, seed: int | None) -> None:
    made = respond(client, model=model)
    text = rendered(("user", TEXT))
    assert made.output_text == expected(seed, text, 8)
    assert (made.object, made.model, made.id[:5]) == ("response", model, "resp_")
    (item,) = made.output
    assert (item.type, item.role, item.status, item.id[:4]) == ("message", "assistant", made.status, "msg_")
    assert made.usage.input_tokens == len(prompt_ids(text))
    assert made.usage.output_tokens == 8
    assert made.usage.total_tokens == made.usage.input_tokens + 8
    assert (made.usage.input_tokens_details.cached_tokens, made.usage.output_tokens_details.reasoning_tokens) == (0, 0)
    assert (made.temperature, made.top_p, made.max_output_tokens, made.error) == (0, 1, 8, None)


def test_what_is_cut_off_is_incomplete_and_what_ends_is_complete(client: Any) -> None:
    made = respond(client)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    whole = made.output_text
    ended = respond(client, extra_body={"stop": whole[2:4]})
    assert (ended.status, ended.incomplete_details, ended.output_text) == ("completed", None, whole[:2])
    assert ended.completed_at >= ended.created_at


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_conversation_and_its_instructions_are_a_chats_messages(client: Any, role: str) -> None:
    items = [message("user", "a ", "dog"), {"role": "assistant", "content": "the cat"}, message("user", "it")]
    text = rendered(("system", "be brief"), ("user", "a dog"), ("assistant", "the cat"), ("user", "it"))
    for made in (
        respond(client, items, instructions="be brief"),
        respond(client, [message(role, "be brief", type="message"), *items]),
    ):
        assert made.output_text == expected(1, text, 8)
        assert made.usage.input_tokens == len(prompt_ids(text))


@pytest.mark.parametrize("sent", [lambda item: item, lambda item: item.model_dump(), lambda item: item.to_dict()])
def test_an_answer_is_sent_back_as_it_came(client: Any, sent: Any) -> None:
    first = respond(client, include=["message.output_text.logprobs"])
    again = respond(client, [message("user", TEXT), *map(sent, first.output), message("user", "it")])
    text = rendered(("user", TEXT), ("assistant", first.output_text), ("user", "it"))
    assert again.output_text == expected(1, text, 8)


def test_what_is_asked_is_told_back(client: Any) -> None:
    own: dict[str, Any] = {"metadata": {"trip": "9"}, "text": {"verbosity": "medium"}, "store": False}
    made = respond(client, instructions="be brief", top_p=0.5, user="me", **own)
    assert (made.metadata, made.instructions, made.top_p, made.user) == ({"trip": "9"}, "be brief", 0.5, "me")
    assert made.to_dict()["store"] is False
    assert respond(client).to_dict()["store"] is False, "nothing is kept where nothing is said, too"
    assert (made.tools, made.tool_choice, made.text.format.type) == ([], "auto", "text")


def test_log_probabilities_are_those_of_a_chat(client: Any) -> None:
    made = respond(client, include=["message.output_text.logprobs"], top_logprobs=2, tokens=4)
    own: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}], "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(model="poems", max_tokens=4, temperature=0, **own)
    for one, other in zip(made.output[0].content[0].logprobs, chat.choices[0].logprobs.content, strict=True):
        assert (one.token, one.bytes) == (other.token, other.bytes)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [(t.token, t.bytes) for t in one.top_logprobs] == [(t.token, t.bytes) for t in other.top_logprobs]
    assert respond(client).output[0].content[0].logprobs == []


def test_the_raw_answer_has_the_headers(client: Any) -> None:
    raw = client.responses.with_raw_response.create(model="poems", input=TEXT, max_output_tokens=8, temperature=0)
    assert raw.headers["x-request-id"]
    assert raw.parse().output_text == respond(client).output_text


def test_sampling_is_the_engines(running: Running, client: Any) -> None:
    four = {respond(client, extra_body={"seed": seed, "temperature": 1.5}).output_text for seed in (1, 2, 3, 4)}
    assert len(four) == 4
    again = respond(client, extra_body={"seed": 1, "temperature": 1.5})
    assert again.output_text in four


# -- streamed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [None, "cut"])
def test_a_stream_has_openais_events_in_their_order(client: Any, stop: str | None) -> None:
    whole = respond(client, include=["message.output_text.logprobs"])
    more = {"extra_body": {"stop": whole.output_text[3:5]}} if stop else {}
    whole = respond(client, include=["message.output_text.logprobs"], **more) if stop else whole
    events = list(respond(client, stream=True, include=["message.output_text.logprobs"], **more))
    last = "response.completed" if stop else "response.incomplete"
    assert list(dict.fromkeys(event.type for event in events)) == [*ORDER, last]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert len(deltas) > 2
    done = {event.type: event for event in events}
    assert done["response.output_text.done"].text == done["response.content_part.done"].part.text == whole.output_text
    assert {event.item_id for event in deltas} == {done["response.output_item.done"].item.id}
    ended, begun = done[last].response, done["response.created"].response
    assert (ended.id, ended.status, ended.usage.output_tokens) == (begun.id, whole.status, whole.usage.output_tokens)
    assert ended.output == [done["response.output_item.done"].item]
    assert ended.output_text == whole.output_text
    assert (begun.status, begun.output, begun.usage) == ("in_progress", [], None)
    told = [one.token for event in deltas for one in event.logprobs]
    assert told == [one.token for one in whole.output[0].content[0].logprobs]


def test_the_clients_own_stream_ends_with_the_whole(client: Any) -> None:
    stop = respond(client).output_text[3:5]
    with client.responses.stream(
        model="poems", input=TEXT, max_output_tokens=8, temperature=0, extra_body={"stop": stop}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert final.output_text == respond(client).output_text[:3]


def test_events_are_named_and_of_the_clients_types(running: Running) -> None:
    body = {"model": "poems", "input": TEXT, "max_output_tokens": 3, "stream": True}
    kind: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    with running.client(running.keys["ann"]) as client, client.stream("POST", "/v1/responses", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in answer.iter_lines() if line]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        document = json.loads(data.removeprefix("data: "))
        assert name == f"event: {document['type']}"
        kind.validate_python(document)
    with running.client(running.keys["ann"]) as client:
        Response.model_validate(client.post("/v1/responses", json={**body, "stream": False}).json())


def test_a_stream_that_fails_says_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("serve"), delay=0.05) as slow:
        events = list(respond(slow.openai(), stream=True, tokens=30, extra_body={"timeout": 0.4, "ignore_eos": True}))
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    assert "not done in time" in failed.error.message
    assert failed.output[0].content[0].text == "".join(e.delta for e in events if hasattr(e, "delta"))


# -- what is not served ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "param", "told"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "answers are not kept here; send the whole"),
        ({"conversation": "conv_1"}, "conversation", "answers are not kept here"),
        ({"store": True}, "store", "answers are not kept here; leave it out"),
        ({"background": True}, "background", "not served"),
        ({"truncation": "auto"}, "truncation", "not served"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "not served"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", 'or "json_schema"'),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "is missing"),
        ({"text": {"format": {"type": "text", "schema": {}}}}, "text.format.schema", "only with type: json_schema"),
        ({"text": {"format": {"type": "json_object"}}, "ignore_eos": True}, "ignore_eos", "not with a form"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not served"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "not served"),
        ({"include": ["web_search_call.results"]}, "include[0]", "message.output_text.logprobs"),
        ({"top_logprobs": 2}, "top_logprobs", "only with include"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 9999}, "max_output_tokens", "at most 4096"),
        ({"input": []}, "input", "at least 1"),
        ({"input": ""}, None, ""),
        ({"input": "the cat " * 300}, "input", "tokens of prompt and answer"),
        ({"input": [message("wizard", "a")]}, "input[0].role", "'user'"),
        ({"input": [{"type": "computer_call", "call_id": "x"}]}, "input[0].type", "not served"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content[0].type", "not served"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        ({"messages": []}, "messages", "no such option"),
        ({"n": 2}, "n", "no such option"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_named(
    running: Running, more: dict[str, Any], param: str | None, told: str
) -> None:
    with running.client(running.keys["ann"]) as client:
        answer = client.post("/v1/responses", json={"model": "poems", "input": TEXT, **more})
    if param is None:
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert told in error["message"]


def test_what_asks_for_nothing_is_taken(running: Running) -> None:
    from kilotune.serve.http.responses_body import ResponseBody

    body = {**dict.fromkeys(ResponseBody.model_fields), "model": "poems", "input": TEXT, "max_output_tokens": 1}
    taken: list[dict[str, Any]] = [
        {"text": {}, "reasoning": {}, "metadata": {}, "include": [], "background": False},
        {"text": {"format": {"type": "text"}, "verbosity": None}, "reasoning": {"effort": "none", "summary": None}},
        {"tools": [], "tool_choice": "auto", "truncation": "disabled", "service_tier": "auto", "store": False},
        {"include": ["reasoning.encrypted_content"], "stream_options": {"include_obfuscation": False}},
    ]
    with running.client(running.keys["ann"]) as client:
        for more in taken:
            answer = client.post("/v1/responses", json={**body, **more})
            assert answer.status_code == 200, answer.text


def test_anothers_adapter_is_not_there(running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        respond(running.openai("ann"), model="secret-plans")
    assert refused.value.code == "model_not_found"


def test_without_a_chat_template_it_is_refused(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running.service.prompts.templates, "base", "this model has no chat template")
    with pytest.raises(openai.BadRequestError, match="no chat template") as refused:
        respond(running.openai())
    assert refused.value.param == "input"


def test_nothing_is_there_to_be_read(running: Running) -> None:
    with running.client(running.keys["ann"]) as client:
        answer: httpx2.Response = client.get("/v1/responses/resp_1")
    assert answer.status_code == 404
