"""Calls of tools in texts, however these come."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from kilotune.serve.http.http_errors import ApiError
from kilotune.serve.http.tool_bodies import ToolAsk, ToolsBody
from kilotune.serve.http.tool_formats import FORMATS, call_head, format_of
from kilotune.serve.http.tool_reader import called, reader_of
from tests.support import chat_tokenizers
from tests.support.guided_support import TEMPLATES, weather


def ask(parallel: bool = True) -> ToolAsk:
    tools = [weather(), {"type": "function", "function": {"name": "now"}}]
    made = ToolsBody.model_validate({"tools": tools, "parallel_tool_calls": parallel}).asks_tools
    assert made is not None
    return made


def read(form: str, text: str, sure: bool = False, parallel: bool = True, seed: int | None = None) -> Any:
    """(content, calls as (name, arguments)); seed: in pieces."""
    reader = reader_of(FORMATS[form], ask(parallel), sure)
    chance, pieces, at = random.Random(seed), [], 0
    while at < len(text):
        size = len(text) if seed is None else chance.choice([1, 1, 2, 3, 7, 20])
        pieces += reader.read(text[at : at + size])
        at += size
    pieces += reader.end()
    calls = called(pieces)
    assert reader.calls == len(calls)
    assert len({call["id"] for call in calls}) == len(calls)
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return "".join(piece.content for piece in pieces), found


ONE = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 1}}\n</tool_call>'
NOW = '<tool_call>{"arguments": {}, "name": "now"}</tool_call>'
BERN = ("weather", '{"city": "Bern", "days": 1}')
LLAMA = '{"name": "weather", "parameters": {"city": "Bern", "days": 1}}'
LIST = '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'
NAMES = '<tool_call>{"name": ["now"], "arguments": {}}</tool_call>'
TEXTS: list[tuple[str, str, Any]] = [
    ("hermes", "plain text, < and <tool and {}\n", ("plain text, < and <tool and {}\n", [])),
    ("hermes", "", ("", [])),
    ("hermes", "  \n", ("  \n", [])),
    ("hermes", ONE, ("", [BERN])),
    ("hermes", f"\n{ONE}\n{NOW}\n", ("", [BERN, ("now", "{}")])),
    ("hermes", f"Let me see. \n{ONE} so\n", ("Let me see. so", [BERN])),
    ("hermes", ONE.removesuffix("</tool_call>"), ("", [BERN])),
    ("hermes", "<tool_call>\n{broken}\n</tool_call>", ("<tool_call>\n{broken}\n</tool_call>", [])),
    ("hermes", ONE.replace("weather", "rain"), (ONE.replace("weather", "rain"), [])),
    ("hermes", LIST, (LIST, [])),
    ("hermes", "<tool_call>" + "[" * 5000 + "</tool_call>", ("<tool_call>" + "[" * 5000 + "</tool_call>", [])),
    ("hermes", NAMES, (NAMES, [])),
    ("hermes", "<tool_call>{", ("<tool_call>{", [])),
    ("hermes", f"<tool_call>no</tool_call>{NOW}", ("<tool_call>no</tool_call>", [("now", "{}")])),
    ("llama3_json", LLAMA, ("", [BERN])),
    ("llama3_json", f"\n <|python_tag|>{LLAMA}; {LLAMA} ", ("", [BERN, BERN])),
    ("llama3_json", f"So: {LLAMA}", (f"So: {LLAMA}", [])),
    ("llama3_json", f"{LLAMA} and more", (f"{LLAMA} and more", [])),
    ("llama3_json", '{"name": "now", "arguments": {}}', ("", [("now", "{}")])),
    ("llama3_json", '{"name": "rain", "parameters": {}}', ('{"name": "rain", "parameters": {}}', [])),
    ("llama3_json", '{"a": 1}', ('{"a": 1}', [])),
    ("llama3_json", LLAMA[:-3], (LLAMA[:-3], [])),
    ("llama3_json", "<|py", ("<|py", [])),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "wanted"), TEXTS)
def test_calls_are_read_and_what_is_none_stays(form: str, text: str, wanted: Any) -> None:
    assert read(form, text) == wanted
    for seed in range(8):
        assert read(form, text, seed=seed) == wanted


def test_one_call_alone_where_they_may_not_be_side_by_side() -> None:
    assert read("hermes", f"{ONE}\n{NOW}", parallel=False) == ("", [BERN])
    assert read("llama3_json", f"{LLAMA}; {LLAMA}", parallel=False) == ("", [BERN])


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_what_is_sure_is_told_piece_by_piece(seed: int | None) -> None:
    tricky = json.dumps({"city": 'a "}{\\" </tool_call> b', "days": [1, {"x": "}"}]})
    for form, between in (("hermes", "\n"), ("llama3_json", "; ")):
        made = FORMATS[form]
        calls = [
            f"{made.begin}{call_head(made, name)}{arguments}}}{made.end}"
            for name, arguments in (("weather", tricky), ("now", "{ }"))
        ]
        content, found = read(form, between.join(calls), sure=True, seed=seed)
        assert (content, found) == ("", [("weather", tricky), ("now", "{ }")])
    begun = f'hello {FORMATS["hermes"].begin}{call_head(FORMATS["hermes"], "weather")}{{"city": '
    assert read("hermes", begun, sure=True, seed=seed) == ("hello", [("weather", '{"city": ')])


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_mark_that_is_a_word_takes_nothing_with_it(seed: int | None) -> None:
    """In the text of a JSON answer, say, where calls are sure: nothing behind it is lost."""
    for text in (
        '{"said": "<tool_call> and </tool_call> are marks"}',
        "so <tool_call>, or <tool_call>\n{} and more",
        '<tool_call>\n{"name": "wea',
        '{"x": "<tool_call>{\\"name\\": 1}"}',
    ):
        cut = text.startswith("<")  # as a call begins
        assert read("hermes", text, sure=True, seed=seed) == ("" if cut else text, [])
    call = f"{FORMATS['hermes'].begin}{call_head(FORMATS['hermes'], 'now')}{{}}}}{FORMATS['hermes'].end}"
    assert read("hermes", f"no <tool_call> yet {call}", sure=True, seed=seed) == (
        "no <tool_call> yet",
        [("now", "{}")],
    )


def test_arguments_come_before_the_call_ends_where_it_is_sure() -> None:
    reader = reader_of(FORMATS["hermes"], ask(), sure=True)
    assert [*reader.read('<tool_call>\n{"name": "weather", "arg')] == []
    (begun,) = reader.read('uments": ')
    assert (begun.name, begun.arguments, begun.call) == ("weather", "", 0)
    assert [piece.arguments for piece in reader.read('{"city": "Be')] == ['{"city": "Be']
    free = reader_of(FORMATS["hermes"], ask(), sure=False)
    assert [*free.read('<tool_call>\n{"name": "weather", "arguments": {"city": "Be')] == []


def test_the_template_says_the_form() -> None:
    for name, template in TEMPLATES.items():
        assert format_of(template).name == name
    assert format_of("{{ tools }}", "hermes").name == "hermes"
    with pytest.raises(ApiError, match="chat template takes none"):
        format_of(chat_tokenizers.CHATML)
    with pytest.raises(ApiError, match="writes calls in Mistral's form; served are hermes and llama3_json"):
        format_of("{{ tools }}[AVAILABLE_TOOLS] [TOOL_CALLS]")
    with pytest.raises(ApiError, match="in the XML of Qwen3-Coder"):
        format_of("{{ tools }}<tool_call>\n<function=name> arguments")
    with pytest.raises(ApiError, match="in no form that is known"):
        format_of("{{ tools }}")
