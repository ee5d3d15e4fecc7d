"""The engine over transformers' continuous batching: every request is what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from serve_support import Served, alone, answers, greedy, prompt_of


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served"), count=4, forms=("vera", "lora")) as made:
        yield made


def test_a_mixed_batch_gives_the_tokens_of_each_alone(served: Served) -> None:
    asked: list[tuple[Any, ...]] = []
    expected = []
    for i in range(10):
        which = i % 5
        prompt = prompt_of(i, 3 + 4 * i)
        model = served.base if which == 4 else served.models[which]
        asked.append((prompt, greedy(12), None if which == 4 else served.keys[which], "t"))
        expected.append(alone(model, prompt, 12))
    got = answers(served.engine, asked)
    assert [one.ids for one in got] == expected
    assert len({tuple(ids) for ids in expected}) > 5
    assert all(one.finish.reason == "length" and one.finish.completion_tokens == 12 for one in got)
