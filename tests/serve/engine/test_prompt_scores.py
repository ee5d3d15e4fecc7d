"""Log-probabilities of a prompt's own tokens, against transformers' plain forward in float64."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilotune import PeftModel, VeraConfig, get_peft_model
from kilotune.errors import ConfigError
from kilotune.serve.engine import prompt_scores
from kilotune.serve.engine.fairness import Unread, share_out
from kilotune.serve.engine.interface import AdapterKey, Generation, Prompted, Sampling, Token
from kilotune.serve.engine.prompt_scores import LEAST, PromptScores, most_tokens, share_scored
from tests.support.models import randomize
from tests.support.serve_support import VOCABULARY, Served, alone, answer, answers, greedy, prompt_of


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    with Served(folder, count=4, kinds=("vera", "lora"), batch_tokens=24, max_running=8) as made:
        yield made


@functools.cache
def rows_of(model: Any, prompt: tuple[int, ...]) -> Tensor:
    """(tokens - 1, V): of each token but the first, after those before it."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        return wide(input_ids=torch.tensor([list(prompt)])).logits[0, :-1].log_softmax(-1)


def check(got: Any, model: Any, prompt: tuple[int, ...], top: int) -> None:
    (first, *scores) = got.prompted.scores
    assert first is None
    assert [one.id for one in scores] == [*prompt[1:]]
    for one, row in zip(scores, rows_of(model, prompt), strict=True):
        assert one.logprob == pytest.approx(float(row[one.id]), abs=2e-5)
        likelier = [int((row > row[one.id] + slack).sum()) for slack in (4e-5, -4e-5)]  # float32 may see two as one
        assert likelier[0] < one.rank <= likelier[1] or one.rank == likelier[0] + 1
        assert len({i for i, _ in one.top}) == top
        assert [value for _, value in one.top] == pytest.approx(row.topk(top).values.tolist(), abs=2e-5)
        assert [value for _, value in one.top] == pytest.approx([float(row[i]) for i, _ in one.top], abs=2e-5)


def model_of(served: Served, which: int) -> Any:
    return served.base if which == len(served.models) else served.models[which]


def key_of(served: Served, which: int) -> AdapterKey | None:
    return None if which == len(served.models) else served.keys[which]


def test_in_a_mixed_batch_they_are_those_of_each_alone(served: Served) -> None:
    """Prompts that take several steps beside others that ask for nothing; tokens are as ever."""
    asked, kinds = [], len(served.models) + 1
    for i in range(12):
        more = {"prompt_logprobs": i % 4} if i % 3 else {}
        asked.append((prompt_of(i, 1 + 11 * (i % 6)), greedy(4, **more), key_of(served, i % kinds), f"t{i % 3}"))
    for i, (got, one) in enumerate(zip(answers(served.engine, asked), asked, strict=True)):
        model = model_of(served, i % kinds)
        assert got.ids == alone(model, one[0], 4)
        if i % 3:
            check(got, model, one[0], i % 4)
        else:
            assert got.prompted is None


def test_a_cached_prefix_is_passed_over_and_stays_in_use(served: Served) -> None:
    prompt = prompt_of(77, 70)
    asked = (prompt, greedy(3), served.keys[1], "t")
    answers(served.engine, [asked])
    assert answers(served.engine, [asked])[0].finish.cached_tokens == 64
    for _ in range(2):
        (got,) = answers(served.engine, [(prompt, greedy(3, prompt_logprobs=2), served.keys[1], "t")])
        assert got.finish.cached_tokens == 0
        check(got, served.models[1], prompt, 2)
    (after,) = answers(served.engine, [asked])
    assert after.finish.cached_tokens == 64
    assert after.ids == got.ids == alone(served.models[1], prompt, 3)


def test_a_prompt_may_be_all_that_is_asked_for(served: Served) -> None:
    prompt = prompt_of(5, 40)
    for more in ({"prompt_logprobs": 1}, {}):
        (got,) = answers(served.engine, [(prompt, greedy(0, **more), served.keys[0], "t")])
        assert got.ids == []
        assert (got.finish.reason, got.finish.text) == ("length", "")
        assert (got.finish.prompt_tokens, got.finish.completion_tokens) == (40, 0)
        if more:
            check(got, served.models[0], prompt, 1)
    longest = prompt_of(1, served.engine.max_length)
    (got,) = answers(served.engine, [(longest, greedy(0, prompt_logprobs=0), None, "t")])
    check(got, served.base, longest, 0)


def test_one_token_has_nothing_before_it(served: Served) -> None:
    (got,) = answers(served.engine, [((9,), greedy(2, prompt_logprobs=5), None, "t")])
    assert list(got.prompted.scores) == [None]
    assert got.ids == alone(served.base, (9,), 2)


def test_they_come_once_and_before_all_tokens(served: Served) -> None:
    async def run() -> list[Any]:
        request = Generation(
            id="r", tenant="t", adapter=None, prompt=prompt_of(2, 30), sampling=greedy(5, prompt_logprobs=0)
        )
        return [type(item) async for item in served.engine.generate(request)]

    kinds = asyncio.run(run())
    assert kinds[:2] == [Prompted, Token]
    assert kinds.count(Prompted) == 1


def test_who_goes_back_to_wait_has_them_all_the_same(tmp_path: Path) -> None:
    """Its prompt is read again; part of it was known, or all of it, and has been told."""
    with Served(tmp_path, count=2, max_running=2, batch_tokens=16) as served:
        long, engine = prompt_of(4, 120), served.engine

        async def run(tokens: int) -> list[Any]:
            flood = [
                asyncio.create_task(answer(engine, long, greedy(tokens, prompt_logprobs=1), served.keys[i], "flood"))
                for i in range(2)
            ]
            while engine.stats().running < 2:
                await asyncio.sleep(0.001)
            small = [await answer(engine, prompt_of(i), greedy(1), None, f"small{i}") for i in range(4)]
            assert [one.ids for one in small] == [alone(served.base, prompt_of(i), 1) for i in range(4)]
            return await asyncio.gather(*flood)

        for tokens in (2, 30):
            for i, got in enumerate(asyncio.run(run(tokens))):
                check(got, served.models[i], long, 1)
                assert got.ids == alone(served.models[i], long, tokens)


def test_a_head_that_an_adapter_changes_is_its_own(tmp_path: Path) -> None:
    with Served(tmp_path, count=1) as served:
        config = VeraConfig(r=4, target_modules=["down_proj", "lm_head"])
        model: PeftModel = get_peft_model(copy.deepcopy(served.base), config)
        randomize(model, seed=8, scale=0.5)
        version = served.registry.put("t", "head", model.eval())
        key = AdapterKey("t", "head", version.version, version.sha256)
        prompt = prompt_of(3, 25)
        asked = [(prompt, greedy(2, prompt_logprobs=2), one, "t") for one in (key, served.keys[0], None)]
        for got, own in zip(answers(served.engine, asked), (model, served.models[0], served.base), strict=True):
            check(got, own, prompt, 2)


def test_the_logits_of_a_step_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the prompts, and however many of them."""
    monkeypatch.setattr(prompt_scores, "LOGITS", 20 * VOCABULARY)
    seen: list[int] = []
    with Served(tmp_path, count=2) as served:
        head = served.registry.model.get_base_model().lm_head
        handle = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        asked = [(prompt_of(i, 100), greedy(2, prompt_logprobs=1), served.keys[i % 2], f"t{i % 3}") for i in range(5)]
        got = answers(served.engine, [*asked, (prompt_of(9, 200), greedy(2), None, "t")])
        handle.remove()
        for i, one in enumerate(got[:5]):
            check(one, served.models[i % 2], asked[i][0], 1)
        assert max(seen) <= 20 + 6
        seen.clear()
        handle = head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
        answers(served.engine, [(prompt_of(i, 100), greedy(2), None, "t") for i in range(4)])
        handle.remove()
        assert max(seen) <= 4, "who does not ask has the head run once for each"


def test_a_step_is_shared_between_those_that_ask() -> None:
    prompts = [Unread("a", "t", 300), Unread("b", "t", 40), Unread("c", "u", 300), Unread("d", "v", 300)]
    given = share_out(prompts, 512)
    shared = share_scored(given, [prompts[0], prompts[2]], 100)
    assert shared == {**given, "a": 50, "c": 50}
    assert share_scored(given, [prompts[0]], 500) == given
    assert most_tokens(50_000) * 50_000 <= prompt_scores.LOGITS
    assert most_tokens(10**9) == 16


def test_numbers_that_are_none_end_the_request_alone(served: Served) -> None:
    prompt, bad = prompt_of(6, 30), 63

    def spoil(module: Any, args: Any, out: Tensor) -> Tensor | None:
        return out.index_fill(1, torch.tensor([3]), torch.nan) if out.shape[1] > 20 else None

    head = served.registry.model.get_base_model().lm_head
    handle = head.register_forward_hook(spoil)
    (got,) = answers(served.engine, [((*prompt, bad), greedy(2, prompt_logprobs=1), None, "t")])
    handle.remove()
    assert got.finish.reason == "error"
    assert "no longer finite" in got.finish.error
    (again,) = answers(served.engine, [(prompt, greedy(2, prompt_logprobs=1), None, "t")])
    check(again, served.base, prompt, 1)


def test_what_cannot_come_has_a_number_all_the_same() -> None:
    scores = PromptScores((0, 1), 2)
    scores.take(0, torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 0.0, 0.0]]))
    (_, one) = scores.all
    assert one is not None
    assert (one.logprob, one.rank) == (LEAST, 3)
    assert [i for i, _ in one.top] == [2, 0]
    assert scores.complete
    assert scores.finite


@pytest.mark.parametrize(
    ("sampling", "match"),
    [(Sampling(max_tokens=1, prompt_logprobs=-1), "prompt_logprobs"), (Sampling(max_tokens=-1), "max_tokens")],
)
def test_what_cannot_be_asked_is_refused(served: Served, sampling: Sampling, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        answers(served.engine, [((1, 2), sampling, None, "t")])


def parts(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    at = 0
    for length in lengths:
        yield at, at + length
        at += length


@pytest.mark.parametrize("lengths", [(1,) * 150, (150,), (70, 70, 10), (149, 1)])
def test_a_prompt_in_any_parts_and_read_twice_is_the_same(lengths: Sequence[int]) -> None:
    prompt = prompt_of(1, 150)
    logits = torch.randn(150, VOCABULARY, generator=torch.Generator().manual_seed(0))
    whole, other = PromptScores(prompt, 3), PromptScores(prompt, 3)
    whole.take(0, logits)
    for begin, end in [*parts((30, 20)), *parts(lengths)]:
        if not other.complete:
            other.take(begin, logits[begin:end])
    assert list(other.all) == list(whole.all)
    assert whole.all[-1] == whole.all[1:][-1] == list(whole.all)[-1]
