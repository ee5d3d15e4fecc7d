"""LangChain's OpenAI classes against a served process: what they give is what transformers gives."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import pytest

if importlib.util.find_spec("langchain_openai") is None:
    pytest.skip("clients have an environment of their own: make test-clients", allow_module_level=True)

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from tests.support.guided_support import tokenizer_of
from tests.support.http_support import expected, prompt_ids, tokenizer

ASKED = [SystemMessage("be brief"), HumanMessage("a big red dog")]
ROLES = {"system": "system", "human": "user", "ai": "assistant"}


def rendered(messages: list[Any]) -> str:
    told = [{"role": ROLES[message.type], "content": message.content} for message in messages]
    return str(tokenizer().apply_chat_template(told, tokenize=False, add_generation_prompt=True))


def chat(service: Any, model: str = "poems", **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=service.url, api_key=service.key, model=model, temperature=0, max_tokens=8, max_retries=0, **more
    )


@pytest.mark.parametrize(("model", "seed"), [("tiny", None), ("poems", 1), ("letters/1", 2)])
@pytest.mark.parametrize("responses", [False, True])
def test_invoke(service: Any, model: str, seed: int | None, responses: bool) -> None:
    made = chat(service, model, use_responses_api=responses).invoke(ASKED)
    assert made.text == expected(seed, rendered(ASKED), 8)
    assert made.usage_metadata["input_tokens"] == len(prompt_ids(rendered(ASKED)))
    assert made.usage_metadata["output_tokens"] == 8


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    """One for all: LangChain keeps its clients, and a client is of its loop."""
    with asyncio.Runner() as made:
        yield made


@pytest.mark.parametrize("responses", [False, True])
def test_stream_and_astream(service: Any, loop: asyncio.Runner, responses: bool) -> None:
    asked = chat(service, use_responses_api=responses, stream_usage=True)
    chunks = list(asked.stream(ASKED))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.text == expected(1, rendered(ASKED), 8)
    assert whole.usage_metadata["output_tokens"] == 8
    assert len(chunks) > 3

    async def read() -> str:
        return "".join([chunk.text async for chunk in asked.astream(ASKED)])

    assert loop.run(read()) == whole.text


def test_batch(service: Any) -> None:
    texts = ["a dog", "the cat sat", "it", "a big red mat"]
    made = chat(service, "letters").batch([[HumanMessage(text)] for text in texts])
    assert [one.text for one in made] == [expected(2, rendered([HumanMessage(text)]), 8) for text in texts]


@pytest.mark.parametrize("responses", [False, True])
def test_a_conversation_goes_on_with_its_own_messages(service: Any, responses: bool) -> None:
    asked = chat(service, use_responses_api=responses)
    first = asked.invoke("a dog")
    assert isinstance(first, AIMessage)
    begun = [HumanMessage("a dog"), AIMessage(first.text), HumanMessage("it")]
    again = asked.invoke([begun[0], first, begun[2]])
    assert again.text == expected(1, rendered(begun), 8)


def test_log_probabilities(service: Any) -> None:
    made = chat(service, logprobs=True, top_logprobs=2).invoke(ASKED)
    content = made.response_metadata["logprobs"]["content"]
    assert len(content) == 8
    assert all(len(one["top_logprobs"]) == 2 for one in content)


def test_completions(service: Any) -> None:
    asked = OpenAI(base_url=service.url, api_key=service.key, model="poems", temperature=0, max_tokens=8, max_retries=0)
    assert asked.invoke("the cat sat on") == expected(1, "the cat sat on", 8)
    assert "".join(asked.stream("the cat sat on")) == expected(1, "the cat sat on", 8)
    texts = ["a dog", "the mat"]
    assert asked.batch(texts) == [expected(1, text, 8) for text in texts]


# -- answers of a form -------------------------------------------------------------------------------


class Person(BaseModel):
    """Somebody."""

    name: Literal["ann", "bob"]
    age: Literal[1, 22, 333]


def writing(writer: Any, **more: Any) -> ChatOpenAI:
    own = {"base_url": writer.url, "api_key": writer.key, "model": "tiny", "max_tokens": 400, "max_retries": 0}
    return ChatOpenAI(**own, extra_body={"seed": 1}, **more)


@pytest.mark.parametrize("responses", [False, True])
def test_structured_output_by_a_schema(writer: Any, responses: bool) -> None:
    asked = writing(writer, use_responses_api=responses).with_structured_output(Person, method="json_schema")
    assert isinstance(asked.invoke("a dog"), Person)
    *_, last = asked.stream("a cat")
    assert isinstance(last, Person)


def test_structured_output_as_any_json(writer: Any) -> None:
    closing = {str(i): -100 for i in range(500) if tokenizer_of("pairs").decode([i]).strip() != "}"}
    asked = writing(writer, logit_bias=closing).with_structured_output(method="json_mode")
    assert asked.invoke("a dog") == {}


# -- tools -------------------------------------------------------------------------------------------


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Bern", "Rome"]
    days: Literal[1, 2]


def test_structured_output_by_a_call(writer: Any) -> None:
    asked = writing(writer).with_structured_output(Person, method="function_calling", strict=True)
    assert isinstance(asked.invoke("a dog"), Person)
    *_, last = asked.stream("a cat")
    assert isinstance(last, Person)


@pytest.mark.parametrize("responses", [False, True])
def test_bound_tools_are_called_and_answered(writer: Any, responses: bool) -> None:
    asked = writing(writer, use_responses_api=responses).bind_tools(
        [Weather, Person], tool_choice="any", parallel_tool_calls=False, strict=True
    )
    first = asked.invoke("the weather in Bern")
    (call,) = first.tool_calls
    {"Weather": Weather, "Person": Person}[call["name"]](**call["args"])
    chunks = list(asked.stream("the weather in Bern"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [(call["name"], call["args"])]
    told = [HumanMessage("the weather in Bern"), first, ToolMessage("sunny", tool_call_id=call["id"])]
    named = writing(writer, use_responses_api=responses).bind_tools(
        [Weather, Person], tool_choice="Person", strict=True
    )
    made = named.invoke(told)
    assert [one["name"] for one in made.tool_calls] == ["Person"], made
    free = writing(writer, stop=["\n"]).bind_tools([Weather])
    assert free.invoke(told).response_metadata["finish_reason"] in ("stop", "length")
