"""The API against its own document: schemathesis asks everything that the document allows, and what it forbids.

The base's template has tools, and its tokenizer is of bytes, so that tools and answers of a form are asked for, too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks

from kilotune import VeraConfig, get_peft_model
from tests.support.chat_tokenizers import byte_pairs
from tests.support.guided_support import HERMES, guided_base, guided_serving
from tests.support.http_support import BASE, Running

CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
]
FEW = settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
MANY = settings(FEW, max_examples=60)


def adapter(folder: Path, seed: int) -> Path:
    model = get_peft_model(copy.deepcopy(guided_base()), VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=chance))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    with guided_serving(folder, byte_pairs(HERMES), max_tokens=8) as made:
        for seed, name in enumerate(("poems", "letters")):
            made.catalogue.put("ann", name, adapter(folder / name, seed))
        yield made


@pytest.fixture(scope="module")
def api(running: Running) -> Any:
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    return schema.exclude(path="/manage/drain")  # after which there is nothing to see


@pytest.mark.heavy
def test_nothing_that_the_document_allows_or_forbids_is_answered_wrongly(api: Any, running: Running) -> None:
    count, faults = 0, []
    for found in api.get_all_operations():
        for mode in schemathesis.GenerationMode:
            cases = found.ok().as_strategy(generation_mode=mode)
            try:
                given(cases)(FEW(lambda case: asked(case, running)))()
            except Unsatisfiable:  # a request without a body and parameters cannot be wrong
                continue
            except (Exception, BaseExceptionGroup) as error:
                faults.append(f"{found.ok().label}, {mode}: {getattr(error, 'exceptions', error)}"[:1500])
            count += 1
    assert faults == [], "\n\n".join(faults)
    assert count >= 25


def asked(case: Any, running: Running) -> None:
    """Ask, and hold what comes against the document."""
    managing = case.path.startswith(("/manage", "/metrics")) or case.path.endswith("load_lora_adapter")
    key = running.manager if managing else running.keys["ann"]
    model = case.body.get("model") if isinstance(case.body, dict) else None
    if isinstance(model, str) and 1 <= len(model) <= 400:  # one that breaks the document stays as it is
        case.body["model"] = [BASE, "poems", "letters/1"][len(case.body["model"]) % 3]  # else few get past their names
    case.call_and_validate(headers={"Authorization": f"Bearer {key}"}, checks=CHECKS)


# -- tools, and answers of a form --------------------------------------------------------------------

WORDS = st.sampled_from(
    ["", "a", "city", "type", "$ref", "<tool_call>", "<|im_end|>", "\u00e9\U0001f98a", "\ud800", "#/$defs/a", "a+$"]
)
VALUES = st.none() | st.booleans() | st.integers(-9, 9**30) | st.floats(allow_nan=False, allow_infinity=False) | WORDS
KEYS = st.sampled_from(
    ["type", "properties", "required", "items", "enum", "const", "anyOf", "allOf", "oneOf", "not", "$ref", "$defs",
     "pattern", "format", "minLength", "maximum", "additionalProperties", "x-guidance", "uniqueItems", "a"]
)  # fmt: skip
TYPES = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null", "strng"])
INNER = st.recursive(VALUES | TYPES, lambda more: st.lists(more, max_size=3) | st.dictionaries(KEYS, more, max_size=3))
SCHEMAS = st.dictionaries(KEYS, INNER, max_size=4)
NAMES = st.sampled_from(["f", "now", "get.x-y_1", "f" * 64])
TOOLS = st.lists(
    st.fixed_dictionaries(
        {"name": NAMES}, optional={"description": WORDS, "parameters": SCHEMAS, "strict": st.booleans()}
    ),
    min_size=1, max_size=3,
)  # fmt: skip
CHOICES = st.sampled_from(["none", "auto", "required", "f", "now"])
FORMS = st.one_of(
    st.just(None),
    st.builds(lambda schema: ("json_schema", schema), SCHEMAS | st.booleans()),
    st.just(("json_object", None)),
)
ARGUMENTS = st.sampled_from(["", "{}", "[", '{"a": "<|im_end|>"}', '{"a": NaN}', "null", '"x"', "[" * 9000])


def in_chats(tools: list[Any], choice: str, form: Any, arguments: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    named = {"type": "function", "function": {"name": choice}}
    made: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "a cat"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
        ],
        "tools": [{"type": "function", "function": tool} for tool in tools],
        "tool_choice": named if choice in ("f", "now") else choice,
    }
    if form is not None:
        json_schema = {} if form[1] is None else {"json_schema": {"name": "x", "schema": form[1]}}
        made["response_format"] = {"type": form[0], **json_schema}
    return made


def in_responses(tools: list[Any], choice: str, form: Any, arguments: str) -> dict[str, Any]:
    made: dict[str, Any] = {
        "input": [
            {"role": "user", "content": "a cat"},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments},
            {"type": "function_call_output", "call_id": "1", "output": "x"},
        ],
        "tools": [{"type": "function", **tool} for tool in tools],
        "tool_choice": {"type": "function", "name": choice} if choice in ("f", "now") else choice,
    }
    if form is not None:
        more = {} if form[1] is None else {"name": "x", "schema": form[1]}
        made["text"] = {"format": {"type": form[0], **more}}
    return made


@pytest.mark.heavy
def test_whatever_tools_and_forms_are_asked_for_there_is_an_answer_or_a_reason(running: Running) -> None:
    found: list[int] = []

    @MANY
    @given(TOOLS, CHOICES, FORMS, ARGUMENTS, st.booleans(), st.integers(0, 9))
    def asks(tools: list[Any], choice: str, form: Any, arguments: str, stream: bool, seed: int) -> None:
        said = (tools, choice, form, arguments)
        more = {"model": [BASE, "poems", "letters/1"][seed % 3], "stream": stream, "seed": seed}
        asked = {
            "/v1/chat/completions": {**in_chats(*said), **more, "max_tokens": 8},
            "/v1/responses": {**in_responses(*said), **more, "max_output_tokens": 8},
            "/tokenize": {key: value for key, value in in_chats(*said).items() if key in ("messages", "tools")},
        }
        for path, body in asked.items():
            answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            found.append(answer.status_code)
            assert answer.status_code in (200, 400), (path, body, answer.text)
            for line in answer.text.splitlines() if stream else ():
                if line.startswith("data: {"):
                    assert "server_error" not in str(json.loads(line[6:]).get("error") or ""), (path, body, line)

    with running.client(running.keys["ann"]) as client:
        asks()
    assert found.count(200) > len(found) / 10, "some are answered"


def test_afterwards_all_is_as_it_was(running: Running) -> None:
    with httpx2.Client(base_url=running.url) as client:
        assert client.get("/health").json() == {"status": "ok"}
    assert running.service.gate.count == 0
    made = running.openai().completions.create(model="poems", prompt="the cat", max_tokens=2)
    assert made.usage.completion_tokens == 2


def test_the_document_names_the_key_and_the_errors(running: Running) -> None:
    with httpx2.Client(base_url=running.url) as client:
        found = client.get("/openapi.json").json()
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert chat["security"] == [{"key": []}]
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= set(chat["responses"])
    assert "HTTPValidationError" not in str(found["paths"])
    assert set(found["paths"]) >= {"/v1/models", "/v1/completions", "/v1/embeddings", "/v1/classify", "/manage/drain"}
