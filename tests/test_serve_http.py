"""The service speaks OpenAI's API: its own client against it, and the answers against transformers' own generate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serve_support import BASE, Running, expected, serving

PROMPT = "the cat sat on"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("serve")) as made:
        yield made


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    return running.openai()


@pytest.mark.parametrize(
    ("model", "seed"), [(BASE, None), ("poems", 1), ("letters", 2), ("poems/live", 1), ("poems/1", 1)]
)
def test_a_completion_is_the_adapters_own(client: Any, model: str, seed: int | None) -> None:
    made = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert made.choices[0].text == expected(seed, PROMPT, 12)
    assert made.usage.completion_tokens <= 12
    assert made.model == model


def test_the_references_differ() -> None:
    assert len({expected(seed, PROMPT, 12) for seed in (None, 1, 2, 3)}) == 4


@pytest.mark.parametrize("model", [BASE, "poems"])
def test_a_stream_says_the_same(client: Any, model: str) -> None:
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    events = list(
        client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.text for event in events for c in event.choices) == whole.choices[0].text
    assert events[-1].usage == whole.usage
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(events) > 4


def test_another_tenants_adapter_is_not_there(running: Running) -> None:
    with pytest.raises(openai.NotFoundError) as theirs:
        running.openai("ann").completions.create(model="secret-plans", prompt=PROMPT)
    with pytest.raises(openai.NotFoundError) as nobodys:
        running.openai("ann").completions.create(model="secret-plots", prompt=PROMPT)
    assert theirs.value.body["message"].replace("plans", "plots") == nobodys.value.body["message"]
    assert theirs.value.code == "model_not_found"
