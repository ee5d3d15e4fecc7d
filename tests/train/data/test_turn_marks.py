"""Which marks a template has, found by trying it; and which texts a message has."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kilotune.errors import ConfigError
from kilotune.train.data.rendering import ChatTemplate
from kilotune.train.data.spelling import any_of
from kilotune.train.data.turn_marks import TAG, Marks, _patterns, changed, texts_of
from tests.support import chat_tokenizers as chats
from tests.support.chat_tokenizers import byte_pairs, pieces

VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content + ' ' }}{% set rest = messages[1:] %}{% else %}"
    "{{ 'A chat with a good USER. ' }}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}<|assistant|>\n"
NAMES = "{% for m in messages %}{{ eos_token }}GPT4 Correct {{ m.role | capitalize }}: {{ m.content }}{% endfor %}"
BLANKS = "{% for m in messages %}{{ m.content }}{{ eos_token if loop.last else '\n---\n' }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}You are good.\n\n"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


# Llama 3.1's and Mistral's kinds, which write more than marks around a text.
DATED = (
    "{{ bos_token }}[system]\nKnowledge until: 2023\nToday: 26 Jul 2024\n\n{% if messages[0].role == 'system' %}"
    "{{ messages[0].content }}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{{ eos_token }}{% for m in rest %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}"
)
OBJECTS = (
    '{% for m in messages %}{% if m.role == \'tool\' %}[RESULT] {"content": {{ m.content }}, "id": '
    '"{{ m.tool_call_id }}"}{{ eos_token }}{% elif m.tool_calls %}[CALL] {{ m.tool_calls | tojson }}'
    "{% else %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def marks(tokenizer: Any) -> Marks:
    return ChatTemplate(tokenizer)._marks


@pytest.mark.parametrize(
    ("template", "plain"),
    [
        (chats.CHATML, {"<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>"}),
        (chats.LLAMA, {"[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"}),
        (chats.ALPACA, {f"### {role}:" for role in ("System", "Developer", "User", "Assistant", "Tool", "Function")}),
        (VICUNA, {"USER:", "ASSISTANT:"}),
        (ZEPHYR, {f"<|{role}|>" for role in ("system", "developer", "user", "assistant", "tool", "function")}),
        (NAMES, {f"GPT4 Correct {r}:" for r in ("System", "Developer", "User", "Assistant", "Tool", "Function")}),
        (BLANKS, set()),
        (DATED, {"[user]", "[assistant]", "[developer]", "[tool]", "[function]"}),
        (OBJECTS, {"[user]", "[assistant]", "[system]", "[developer]", "[RESULT]", "[function]", "[CALL]"}),
        (NO_SYSTEM, {"[user]", "[assistant]", "[developer]", "[function]"}),
    ],
    ids=["chatml", "llama", "alpaca", "vicuna", "zephyr", "names", "blanks", "dated", "objects", "no system"],
)
def test_marks_that_are_no_tokens(template: str, plain: set[str]) -> None:
    """A tokenizer that has none of them as tokens. A template's own words, and thoughts left out, are no marks."""
    found = marks(pieces("unigram", template))
    # But where they stand in one line with the first mark.
    assert {mark for mark in found.plain if not mark.startswith("A chat")} == plain


def test_marks_that_are_tokens() -> None:
    found = marks(byte_pairs())
    assert set(found.never) == {"<|endoftext|>", *chats.HEADERS}
    assert set(found.answers) == {"<tool_response>", "</tool_response>"}
    assert not found.plain
    gemma = marks(pieces("unigram", chats.GEMMA))
    assert set(gemma.never) == {"<unk>", "<s>", "</s>", *chats.GEMMA_MARKS}
    # With thoughts before each answer, a user may not begin them; the model may.
    thinks = marks(byte_pairs(chats.CHATML.replace("<think>\n\n</think>\n\n", "<think>")))
    assert "<think>" in thinks.answers


def test_the_texts_of_messages() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": ["b", 1], "type": "t"}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}], "name": "ann"},
        {"role": "assistant", "content": "y", "reasoning_content": "z", "tool_calls": [call], "n": None},
    ]
    said = {text.text: (text.place, text.answer, text.named) for text in texts_of(messages)}
    assert said == {
        "user": ("messages[0].role", False, True),
        "text": ("messages[0].content[0].type", False, True),
        "x": ("messages[0].content[0].text", False, False),
        "image": ("messages[0].content[1].type", False, True),
        "ann": ("messages[0].name", False, False),
        "assistant": ("messages[1].role", False, True),
        "y": ("messages[1].content", True, False),
        "z": ("messages[1].reasoning_content", True, False),
        "c1": ("messages[1].tool_calls[0].id", False, False),
        "function": ("messages[1].tool_calls[0].type", False, True),
        "f": ("messages[1].tool_calls[0].function.name", False, False),
        "a": ("messages[1].tool_calls[0].function.arguments", False, False),
        "b": ("messages[1].tool_calls[0].function.arguments.a[0]", False, False),
        "type": ("messages[1].tool_calls[0].function.arguments", False, False),
        "t": ("messages[1].tool_calls[0].function.arguments.type", False, False),
    }
    assert changed(messages, lambda text: text.text) == messages
    shouted = changed(messages, lambda text: text.text.upper())
    assert shouted[1]["tool_calls"][0]["function"]["arguments"] == {"A": ["B", 1], "TYPE": "T"}


def test_one_pattern_for_many_names() -> None:
    names = ["<|a|>", "<|ab|>", "<|", "<|a", "x", "+?", ""]
    text = "<|ab|><|a|><|abc<|xx+?<"
    assert any_of(names).findall(text) == ["<|ab|>", "<|a|>", "<|a", "<|", "x", "x", "+?"]
    assert any_of([]).findall(text) == []


@pytest.mark.parametrize("run", ["<", "[", "\r", "\n", " ", "\n\r "], ids=repr)
def test_long_runs_of_one_character_take_no_time_that_grows_with_their_square(run: str) -> None:
    """What anybody may send is looked through in the process that answers, where a pattern stops all threads.

    200,000 characters took minutes: counted is how long it takes for twice as many.
    """
    marks = _patterns({"USER:": True, "### User:": True}, str)

    def seconds(count: int) -> float:
        text = run * (count // len(run))
        begun = time.process_time()
        for pattern in (TAG, *marks.values()):
            assert not pattern.findall(text)
        return time.process_time() - begun

    seconds(1000)
    assert seconds(200_000) < 2


def test_a_template_has_so_many_marks_that_are_no_tokens() -> None:
    """Each is looked for in each text of a chat."""
    many = "{% for m in messages %}{% for i in range(N) %}[mark-{{ i }}]{% endfor %}{{ m.content }}{% endfor %}"
    assert len(marks(byte_pairs(many.replace("N", "200"))).plain) == 200
    with pytest.raises(ConfigError, match="the chat template has 300 marks of turns that are no tokens; taken are 256"):
        ChatTemplate(byte_pairs(many.replace("N", "300")))
