"""Conversations as the openai client leads them, and how a prompt of one ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.http_support import batching, expected, prompt_ids, serving, tokenizer

ASKED: dict[str, Any] = {"role": "user", "content": "a dog"}
MORE: dict[str, Any] = {"role": "user", "content": "it"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, **batching(folder)) as made:
        yield made.openai()


def chat(client: Any, messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(model="poems", messages=messages, max_tokens=6, temperature=0, **more)


@pytest.mark.parametrize(
    "sent", [lambda m: m, lambda m: m.model_dump(), lambda m: m.to_dict()], ids=["it", "all", "set"]
)
def test_an_answer_is_sent_back_as_it_came(client: Any, sent: Any) -> None:
    """Each turn has the client's own message objects of those before."""
    messages: list[Any] = [ASKED]
    texts: list[dict[str, Any]] = [ASKED]
    for _ in range(2):
        answer = chat(client, messages).choices[0].message
        rendered = tokenizer().apply_chat_template(texts, tokenize=False, add_generation_prompt=True)
        assert answer.content == expected(1, rendered, 6)
        messages += [sent(answer), MORE]
        texts += [{"role": "assistant", "content": answer.content}, MORE]


def test_an_answer_without_content_is_an_empty_one(client: Any) -> None:
    empty = chat(client, [ASKED, {"role": "assistant", "content": ""}, MORE])
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        made = chat(client, [ASKED, message, MORE])
        assert made.choices[0].message == empty.choices[0].message
        assert made.usage.prompt_tokens == empty.usage.prompt_tokens


def test_a_last_answer_is_gone_on_with(client: Any) -> None:
    whole = chat(client, [ASKED]).choices[0].message.content
    begun = [ASKED, {"role": "assistant", "content": whole[:3]}]
    made = chat(client, begun, extra_body={"continue_final_message": True, "add_generation_prompt": False})
    text = tokenizer().apply_chat_template(begun, tokenize=False, continue_final_message=True)
    assert text.endswith(whole[:3])
    assert made.usage.prompt_tokens == len(prompt_ids(text))
    assert made.choices[0].message.content == expected(1, text, 6)
    alone = chat(client, begun, extra_body={"continue_final_message": True})
    assert alone.choices[0].message == made.choices[0].message


def test_a_prompt_may_end_behind_the_last_message(client: Any) -> None:
    made = chat(client, [ASKED], extra_body={"add_generation_prompt": False})
    text = tokenizer().apply_chat_template([ASKED], tokenize=False, add_generation_prompt=False)
    assert made.choices[0].message.content == expected(1, text, 6)
    assert made.usage.prompt_tokens == len(prompt_ids(text))
    assert made.usage.prompt_tokens < chat(client, [ASKED]).usage.prompt_tokens


def test_options_that_would_change_the_answer_are_the_clients_error(client: Any) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(openai.BadRequestError, match="tools: this model's chat template takes none") as refused:
        chat(client, [ASKED], tools=[tool])
    assert refused.value.param == "tools"
