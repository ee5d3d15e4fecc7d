"""litellm against a served process."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from typing import Any

import pytest

if importlib.util.find_spec("litellm") is None:
    pytest.skip("clients have an environment of their own: make test-clients", allow_module_level=True)

import litellm

from tests.support.http_support import expected, prompt_ids, tokenizer

ASKED: Any = [{"role": "user", "content": "a big red dog"}]
PROMPT = "the cat sat on"


def rendered(messages: Any) -> str:
    return str(tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def own(service: Any, model: str, kind: str = "openai") -> dict[str, Any]:
    place = {"api_base": service.url, "api_key": service.key, "num_retries": 0}
    return {"model": f"{kind}/{model}", "max_tokens": 8, "temperature": 0, **place}


@pytest.mark.parametrize(("model", "seed"), [("tiny", None), ("poems", 1), ("poems/live", 1)])
def test_completion(service: Any, model: str, seed: int | None) -> None:
    made = litellm.completion(messages=ASKED, **own(service, model))
    assert made.choices[0].message.content == expected(seed, rendered(ASKED), 8)
    assert made.choices[0].finish_reason == "length"
    assert made.usage.prompt_tokens == len(prompt_ids(rendered(ASKED)))


def test_stream(service: Any) -> None:
    parts = list(litellm.completion(messages=ASKED, stream=True, **own(service, "poems")))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected(1, rendered(ASKED), 8)
    assert len(parts) > 3

    async def read() -> str:
        stream = await litellm.acompletion(messages=ASKED, stream=True, **own(service, "letters"))
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    assert asyncio.run(read()) == expected(2, rendered(ASKED), 8)


def test_a_conversation_goes_on_with_its_own_messages(service: Any) -> None:
    first = litellm.completion(messages=ASKED, **own(service, "poems")).choices[0].message
    again = litellm.completion(messages=[*ASKED, first, {"role": "user", "content": "it"}], **own(service, "poems"))
    told = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": "it"}]
    assert again.choices[0].message.content == expected(1, rendered(told), 8)


def test_text_completion_with_the_prompts_log_probabilities(service: Any) -> None:
    made = litellm.text_completion(
        prompt=PROMPT, logprobs=1, extra_body={"echo": True}, **own(service, "poems", "text-completion-openai")
    )
    choice = made.choices[0]
    assert choice.text == PROMPT + expected(1, PROMPT, 8)
    assert len(choice.logprobs.tokens) == made.usage.total_tokens
    assert choice.logprobs.token_logprobs[0] is None


def test_responses(service: Any) -> None:
    more = {**own(service, "poems"), "max_tokens": None, "max_output_tokens": 16}  # it asks for no less
    made = litellm.responses(input=ASKED[0]["content"], **more)
    assert made.output[0].content[0].text == expected(1, rendered(ASKED), 16)


def test_an_error_is_litellms_own(service: Any) -> None:
    with pytest.raises(litellm.NotFoundError, match="does not exist"):
        litellm.completion(messages=ASKED, **own(service, "nobody"))


def test_a_tool_is_called(writer: Any) -> None:
    weather = {"city": {"enum": ["Bern", "Rome"]}, "days": {"enum": [1, 2]}}
    schema = {"type": "object", "properties": weather, "required": ["city", "days"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    more = {**own(writer, "tiny"), "max_tokens": 400, "tools": tools, "tool_choice": "required", "seed": 1}
    made = litellm.completion(messages=ASKED, **more).choices[0]
    (call,) = made.message.tool_calls[:1]
    assert made.finish_reason == "tool_calls"
    assert {*json.loads(call.function.arguments)} == {"city", "days"}
    told = [
        *ASKED,
        made.message,
        *({"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in made.message.tool_calls),
    ]
    assert litellm.completion(messages=told, **more).choices[0].message.tool_calls
