"""Answers of a form, as the openai client asks for them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pydantic
import pytest

from kilotune.serve.engine import grammars
from kilotune.serve.engine.interface import Grammar
from tests.support.guided_support import SCHEMA, guided_base, guided_serving, masked_greedy, tokenizer_of
from tests.support.http_support import Running, serving

ASKED: list[Any] = [{"role": "user", "content": "a dog"}]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


class Person(pydantic.BaseModel):
    name: Literal["ann", "bob"]
    age: Literal[1, 22, 333]
    tags: list[Literal["red"]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with guided_serving(tmp_path_factory.mktemp("serve")) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return running.openai()


def chat(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": ASKED, "max_tokens": 400, "seed": 1, **more})


def test_a_schema_whole_streamed_and_several(client: Any) -> None:
    made = chat(client, response_format=FORMAT, n=3, temperature=1.3)
    for choice in made.choices:
        assert choice.finish_reason == "stop"
        told = json.loads(choice.message.content)
        assert {*told} == {"name", "age"}
        assert told["name"] in ("ann", "bob")
    stream = chat(client, response_format=FORMAT, temperature=1.3, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == made.choices[0].message.content


def test_the_greedy_answer_is_that_of_transformers_with_the_mask(client: Any) -> None:
    tokenizer = tokenizer_of("pairs")
    prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    grammar = Grammar(kind="json", text=json.dumps(SCHEMA), place="")
    wanted = masked_greedy(guided_base(), "pairs", grammar, prompt, 120)
    got = chat(client, response_format=FORMAT, temperature=0, max_tokens=120)
    assert got.choices[0].message.content == tokenizer.decode(wanted, skip_special_tokens=True)
    assert got.usage.completion_tokens == len(wanted)


def test_parse_gives_the_model_of_pydantic(client: Any) -> None:
    made = client.chat.completions.parse(model="tiny", messages=ASKED, max_tokens=600, seed=2, response_format=Person)
    assert isinstance(made.choices[0].message.parsed, Person)
    again = [*ASKED, made.choices[0].message, *ASKED]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # the client's own, of `parsed`
        more = client.chat.completions.parse(
            model="tiny", messages=again, max_tokens=600, seed=3, response_format=Person
        )
    assert isinstance(more.choices[0].message.parsed, Person)


def test_a_text_that_is_cut_says_so(client: Any) -> None:
    made = chat(client, response_format=FORMAT, max_tokens=3)
    assert made.choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=ASKED, max_tokens=3, response_format=Person)


FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": "(cat|dog){2}"}}, "(cat|dog){2}"),
    ({"structured_outputs": {"choice": ["yes", "no"], "disable_fallback": False}}, "yes|no"),
    ({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}, "a|b"),
    ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
    ({"structured_outputs": {"json": '{"enum": [1, 2]}'}}, "1|2"),
    ({"guided_json": {"const": "x"}}, '"x"'),
    ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
    ({"guided_choice": ["left/\\", 'ri"ght']}, 'left/\\\\|ri"ght'),
    ({"guided_grammar": 'start: "x" /[0-9]/'}, "x[0-9]"),
]


@pytest.mark.parametrize(("more", "form"), FORMS)
def test_the_names_that_vllm_has(client: Any, more: dict[str, Any], form: str) -> None:
    told = chat(client, extra_body=more).choices[0].message.content
    assert re.fullmatch(form, told), told
    plain = client.completions.create(model="tiny", prompt=["a dog", "the cat"], max_tokens=60, seed=1, extra_body=more)
    assert all(re.fullmatch(form, choice.text) for choice in plain.choices)


def test_an_object_is_any_object(client: Any) -> None:
    bias = {str(i): -100 for i in range(500) if tokenizer_of("pairs").decode([i]).strip() != "}"}
    for more in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        told = chat(client, extra_body=more, logit_bias=bias).choices[0].message.content
        assert json.loads(told) == {}
    plain = client.completions.create(
        model="tiny", prompt="a", max_tokens=9, logit_bias=bias, extra_body={"response_format": {"type": "json_object"}}
    )
    assert json.loads(plain.choices[0].text) == {}


def schema(**what: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": what}}}}


PLACE = "response_format.json_schema.schema.properties.a"
FORM, OUT = "response_format", "structured_outputs"
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({FORM: schema(type="strng")}, f"{PLACE}.type", "no JSON schema"),
    ({FORM: schema(uniqueItems=True)}, f"{PLACE}.uniqueItems", "uniqueItems"),
    ({FORM: schema(**{"$ref": "https://example.org/x"})}, f"{PLACE}.$ref", "https://example.org/x"),
    ({FORM: {**FORMAT, "type": "json_object"}}, f"{FORM}.json_schema", "only with type"),
    ({FORM: {"type": "json_schema", "json_schema": {"name": "x"}}}, f"{FORM}.json_schema.schema", "is missing"),
    ({FORM: FORMAT, "guided_regex": "a"}, "guided_regex", "not together with response_format"),
    ({OUT: {"regex": "a", "choice": ["a"]}}, OUT, "not regex together with choice"),
    ({OUT: {"structural_tag": "x"}}, f"{OUT}.structural_tag", "not served; taken is null alone"),
    ({FORM: {"type": "structural_tag"}}, f"{FORM}.type", '"structural_tag" is not served; taken is "text", "json_'),
    ({OUT: {"json": {}, "whitespace_pattern": " ?"}}, f"{OUT}.whitespace_pattern", "not served; taken is "),
    ({OUT: {"regex": "a", "disable_fallback": True}}, f"{OUT}.disable_fallback", "not served"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_regex": "(?<=a)b"}, "guided_regex", "look-around"),
    ({"guided_regex": "x" * 300_000}, "guided_regex", "at most"),
    ({"guided_json": {"enum": ["x" * 99] * 4000}}, "guided_json", "bytes; at most"),
    ({"guided_json": "{"}, "guided_json", "no JSON"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "not with a form"),
]


@pytest.mark.parametrize(("more", "param", "told"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_told_with_its_place(
    client: Any, more: dict[str, Any], param: str, told: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, extra_body=more, stream=stream)
    assert refused.value.param == param
    assert told in refused.value.message


def test_without_strict_what_cannot_be_held_to_is_passed_over(client: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "schema": {"enum": [7], "not": {}}}}
    assert chat(client, response_format=form).choices[0].message.content == "7"
    form["json_schema"]["strict"] = True  # type: ignore[index]
    with pytest.raises(openai.BadRequestError, match="not"):
        chat(client, response_format=form)


def test_a_grammar_that_leads_nowhere_ends_with_its_own_error(client: Any) -> None:
    """No token of this model is a byte that begins no character."""
    with pytest.raises(openai.APIError) as failed:
        [*chat(client, extra_body={"guided_grammar": 'start: "a" | "b" <[600]>'}, stream=True)]
    assert "guided_grammar" in str(failed.value) or "grammar" in str(failed.value)
    assert chat(client, max_tokens=2).choices[0].finish_reason == "length"


def test_without_the_package_it_is_501_and_says_what_to_install(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "PACKAGES", ("no_such_package_at_all",))
    with guided_serving(tmp_path) as running, running.client(running.keys["ann"]) as own:
        body = {"model": "tiny", "messages": ASKED, "max_tokens": 2}
        refused = own.post("/v1/chat/completions", json={**body, "guided_regex": "a"})
        assert refused.status_code == 501
        assert refused.json()["error"]["code"] == "not_installed"
        assert "pip install 'kilotune[serve]'" in refused.json()["error"]["message"]
        assert own.post("/v1/chat/completions", json=body).status_code == 200


def test_a_vocabulary_that_cannot_write_it_is_the_requests_error(tmp_path: Any) -> None:
    from tests.support.http_support import batching

    with (
        serving(tmp_path, **batching(tmp_path)) as running,
        pytest.raises(openai.BadRequestError, match="nothing fits it"),
    ):
        chat(running.openai(), extra_body={"guided_json": {"type": "object"}}, max_tokens=9)


# -- in /v1/responses --------------------------------------------------------------------------------


def respond(client: Any, form: Any, **more: Any) -> Any:
    own = {"model": "tiny", "input": "a dog", "max_output_tokens": 400, "text": {"format": form}}
    return client.responses.create(**own, extra_body={"seed": 1, **more})


FLAT: Any = {"type": "json_schema", **FORMAT["json_schema"]}


def test_a_response_has_the_form_that_a_chat_has(client: Any) -> None:
    made = respond(client, FLAT)
    assert made.output_text == chat(client, response_format=FORMAT).choices[0].message.content
    assert made.status == "completed"
    assert made.text.format.to_dict() == FLAT, "it comes back"
    bias = {str(i): -100 for i in range(500) if tokenizer_of("pairs").decode([i]).strip() != "}"}
    assert json.loads(respond(client, {"type": "json_object"}, logit_bias=bias).output_text) == {}
    cut = client.responses.create(model="tiny", input="a dog", max_output_tokens=3, text={"format": FLAT})
    assert cut.status == "incomplete"


def test_a_response_is_parsed_whole_and_streamed(client: Any) -> None:
    own: dict[str, Any] = {"model": "tiny", "input": "a dog", "max_output_tokens": 600, "text_format": Person}
    assert isinstance(client.responses.parse(**own).output_parsed, Person)
    with client.responses.stream(**own) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Person)


def test_what_is_wrong_in_a_responses_schema_is_told_with_its_place(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        respond(client, {**FLAT, "schema": {"properties": {"a": {"type": "strng"}}}})
    assert refused.value.param == "text.format.schema.properties.a.type"
    loose = {**FLAT, "strict": False, "schema": {"enum": [7], "not": {}}}
    assert respond(client, loose).output_text == "7"
