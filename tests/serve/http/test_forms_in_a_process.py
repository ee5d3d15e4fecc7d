"""Answers of a form and tools by ``kilotune serve`` as people run it, asked by the openai client."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.serve.http.test_process import keys, process
from tests.support.chat_tokenizers import byte_pairs
from tests.support.guided_support import SCHEMA, TEMPLATES, guided_base, weather

pytestmark = pytest.mark.heavy
ASKED: list[Any] = [{"role": "user", "content": "the weather in Bern"}]


class Person(pydantic.BaseModel):
    name: Literal["ann", "bob"]
    age: Literal[1, 22]


@pytest.fixture(scope="module", params=[*TEMPLATES])
def clients(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Of two tenants of one process."""
    folder: Path = tmp_path_factory.mktemp("serve")
    guided_base().save_pretrained(folder / "base")
    byte_pairs(TEMPLATES[request.param]).save_pretrained(folder / "base")
    ring, tenants, _ = keys(folder, "ann", "bob")
    with process(
        folder / "base", folder / "adapters.db", folder, "--keys", str(ring), "--name", "tiny",
        "--tool-format", request.param,
    ) as served:  # fmt: skip
        made = {
            space: openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0, timeout=60)
            for space, key in tenants.items()
        }
        yield made
        for client in made.values():
            client.close()


def test_a_form_a_class_and_a_conversation_with_tools(clients: dict[str, Any]) -> None:
    chat = clients["ann"].chat.completions
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    made = chat.create(model="tiny", messages=ASKED, response_format=form, max_tokens=500, seed=1)
    assert json.loads(made.choices[0].message.content)["name"] in ("ann", "bob")
    parsed = chat.parse(model="tiny", messages=ASKED, response_format=Person, max_tokens=500, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Person)

    asked: dict[str, Any] = {"model": "tiny", "tools": [weather(strict=True)], "tool_choice": "required", "seed": 2}
    asked |= {"max_tokens": 600, "parallel_tool_calls": False}
    messages: list[Any] = [*ASKED]
    for _ in range(2):
        message = chat.create(messages=messages, **asked).choices[0].message
        (call,) = message.tool_calls
        assert json.loads(call.function.arguments)["city"] in ("Bern", "Oslo")
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    with chat.stream(messages=messages, **asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in events
    assert final.finish_reason == "tool_calls"
    whole = chat.create(messages=messages, **asked).choices[0].message.tool_calls[0].function
    assert (final.message.tool_calls[0].function.name, final.message.tool_calls[0].function.arguments) == (
        "weather", whole.arguments,
    )  # fmt: skip


def test_a_stranger_who_sends_what_explodes_keeps_nobody_waiting(clients: dict[str, Any]) -> None:
    """Ann's tokens come while bob sends what takes a second to compile, or has much to find out for each token."""
    stop = threading.Event()
    forms: list[dict[str, Any]] = [
        {"guided_regex": "((a{1,40}){1,40}){1,40}x"},
        {"guided_regex": "(.*a.{300}b)|((a+)+)+b"},
        {"guided_json": {"type": "string", "pattern": "^(x+x+)+y$"}},
        {"guided_json": {"enum": [f"word number {i}" for i in range(10_000)]}},
        {"guided_grammar": "start: e\ne: e e e | e e | /a+/ | "},
    ]

    def strange() -> None:
        for form in itertools.cycle(forms):
            if stop.is_set():
                return
            with suppress(openai.APIStatusError, openai.APIError):
                clients["bob"].completions.create(model="tiny", prompt="a", max_tokens=30, extra_body=form)

    def gaps() -> list[float]:
        times = []
        for _ in clients["ann"].completions.create(
            model="tiny", prompt="the cat", max_tokens=400, stream=True, temperature=0, extra_body={"ignore_eos": True}
        ):
            times.append(time.monotonic())
        return [b - a for a, b in itertools.pairwise(times)]

    alone = sorted(gaps())
    threads = [threading.Thread(target=strange) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    beside = sorted(gaps())
    stop.set()
    for thread in threads:
        thread.join(120)
    print(f"\ngaps alone: median {1000 * alone[len(alone) // 2]:.1f} ms, longest {1000 * alone[-1]:.0f} ms")
    print(f"beside:     median {1000 * beside[len(beside) // 2]:.1f} ms, longest {1000 * beside[-1]:.0f} ms")
    assert beside[-1] < 1.0
