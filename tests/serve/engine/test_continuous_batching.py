"""The engine over transformers' continuous batching: every request is what it is alone, whatever runs beside it."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.errors import ConfigError, StoreError, UnsupportedError
from kilotune.serve.engine.interface import AdapterKey, EngineError, Finish, Generation, Sampling
from kilotune.serve.engine.running_requests import Run
from tests.support.models import randomize
from tests.support.serve_support import Served, adapter_of, alone, answer, answers, base_model, greedy, prompt_of


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served"), count=4, kinds=("vera", "lora")) as made:
        yield made


def mixed(served: Served, count: int, tokens: int, length: int = 3) -> tuple[list[tuple[Any, ...]], list[list[int]]]:
    """Requests for all adapters and the base, and what each gives alone."""
    asked: list[tuple[Any, ...]] = []
    expected = []
    kinds = len(served.models) + 1
    for i in range(count):
        which = i % kinds
        prompt = prompt_of(i, length + 4 * (i % 9))
        model = served.base if which == kinds - 1 else served.models[which]
        asked.append((prompt, greedy(tokens), None if which == kinds - 1 else served.keys[which], f"t{i % 3}"))
        expected.append(alone(model, prompt, tokens))
    return asked, expected


def test_a_mixed_batch_gives_the_tokens_of_each_alone(served: Served) -> None:
    asked, expected = mixed(served, 10, 12)
    got = answers(served.engine, asked)
    assert [one.ids for one in got] == expected
    assert len({tuple(ids) for ids in expected}) > 5
    assert all(one.finish.reason == "length" and one.finish.completion_tokens == 12 for one in got)


def test_stock_attention_gives_the_same(tmp_path: Path) -> None:
    base = copy.deepcopy(base_model())
    base.config.sliding_window = 4096  # which our own attention leaves to transformers
    with Served(tmp_path, count=2, base=base) as served:
        assert served.engine._batch is not None
        assert not served.engine._batch._own
        asked, expected = mixed(served, 6, 8)
        assert [one.ids for one in answers(served.engine, asked)] == expected


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 2},
        {"max_running": 3},
        {"batch_tokens": 16, "max_running": 8},
        {"cache_tokens": 96, "page": 8},
    ],
    ids=["fewer slots than adapters", "few places", "prompts in pieces", "a cache that is too small"],
)
def test_where_room_is_short_nothing_changes_but_the_time(tmp_path: Path, options: dict[str, int]) -> None:
    with Served(tmp_path, count=4, **options) as served:
        asked, expected = mixed(served, 15, 10)
        assert [one.ids for one in answers(served.engine, asked)] == expected
        stats = served.engine.stats()
        assert stats.waiting == stats.running == 0
        assert all(home.users == 0 for home in served.registry.residents._banks.values())


def test_log_probabilities_are_the_models_own(served: Served) -> None:
    prompt = prompt_of(3)
    sampling = Sampling(max_tokens=5, temperature=1.7, top_p=0.9, seed=3, logprobs=3)
    (got,) = answers(served.engine, [(prompt, sampling, served.keys[0], "t")])
    ids = [*prompt, *got.ids]
    with torch.no_grad():
        logits = served.models[0](input_ids=torch.tensor([ids])).logits[0].float()
    expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    for token, row in zip(got.tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=2e-5)
        best = row.topk(3)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), abs=2e-5)


def test_a_seed_gives_the_same_draws_in_any_company(served: Served) -> None:
    sampling = Sampling(max_tokens=12, temperature=1.3, seed=7)
    one = (prompt_of(1), sampling, served.keys[0], "t")
    (first,) = answers(served.engine, [one])
    others = [(prompt_of(i), Sampling(max_tokens=12, temperature=2.0), served.keys[i % 4], "u") for i in range(6)]
    again = answers(served.engine, [*others, one])[-1]
    assert first.ids == again.ids
    other_seed = (prompt_of(1), Sampling(max_tokens=12, temperature=1.3, seed=8), served.keys[0], "t")
    assert answers(served.engine, [other_seed])[0].ids != first.ids


def test_ends(served: Served) -> None:
    whole = alone(served.models[1], prompt_of(2), 12)
    stop = whole[5]
    at = whole.index(stop)
    (got,) = answers(served.engine, [(prompt_of(2), greedy(12, stop_token_ids=(stop,)), served.keys[1], "t")])
    assert got.ids == whole[: at + 1]
    assert got.finish.reason == "stop"
    assert (got.finish.prompt_tokens, got.finish.completion_tokens) == (7, at + 1)


def test_a_form_that_made_way_comes_back(tmp_path: Path) -> None:
    with Served(tmp_path, count=2, kinds=("vera", "lora"), forms=1, max_running=1) as served:
        for i in (0, 1, 0):
            (got,) = answers(served.engine, [(prompt_of(i), greedy(6), served.keys[i], "t")])
            assert got.ids == alone(served.models[i], prompt_of(i), 6)

        async def run() -> Any:
            first = asyncio.create_task(answer(served.engine, prompt_of(2), greedy(60), None, "t"))
            while served.engine.stats().running == 0:
                await asyncio.sleep(0.001)
            second = asyncio.create_task(answer(served.engine, prompt_of(3), greedy(6), served.keys[0], "t"))
            while served.engine.stats().waiting == 0:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(served.registry.row, served.keys[1])  # takes the place of the one that waits
            assert served.registry.there(served.keys[0]) is None
            await first
            return await second

        assert asyncio.run(run()).ids == alone(served.models[0], prompt_of(3), 6)


# -- prefixes ----------------------------------------------------------------------------------------


def test_prefixes_are_shared_with_nobody_else(tmp_path: Path) -> None:
    prompt = prompt_of(9, 100)
    with Served(tmp_path, count=2) as served:
        registry, engine = served.registry, served.engine
        other = registry.put("other", "a0", served.models[0])  # the same contents, of another tenant
        theirs = AdapterKey("other", "a0", other.version, other.sha256)
        assert theirs.sha256 == served.keys[0].sha256
        expected = [alone(model, prompt, 6) for model in (*served.models, served.base)]
        (first,) = answers(engine, [(prompt, greedy(6), served.keys[0], "t")])
        assert first.finish.cached_tokens == 0
        assert first.ids == expected[0]
        (again,) = answers(engine, [(prompt, greedy(6), served.keys[0], "t")])
        assert again.finish.cached_tokens == 96
        assert again.ids == expected[0]
        for key, tenant, want in (
            (served.keys[1], "t", expected[1]),
            (None, "t", expected[2]),
            (None, "other", expected[2]),
            (theirs, "other", expected[0]),
            (served.keys[0], "u", expected[0]),
        ):
            (got,) = answers(engine, [(prompt, greedy(6), key, tenant)])
            assert got.ids == want
            assert got.finish.cached_tokens == 0, (key, tenant)


def test_equal_prompts_at_once_do_not_leak(tmp_path: Path) -> None:
    prompt = prompt_of(9, 50)
    with Served(tmp_path, count=4) as served:
        for _ in range(3):
            got = answers(served.engine, [(prompt, greedy(6), key, "t") for key in [*served.keys, None]])
            models = [*served.models, served.base]
            assert [one.ids for one in got] == [alone(model, prompt, 6) for model in models]


# -- tenants -----------------------------------------------------------------------------------------


def test_a_flood_does_not_keep_another_tenant_waiting(tmp_path: Path) -> None:
    with Served(tmp_path, count=2, max_running=4) as served:
        engine = served.engine

        async def run() -> tuple[int, list[Any]]:
            flood = [asyncio.create_task(answer(engine, prompt_of(i), greedy(30), None, "flood")) for i in range(16)]
            while engine.stats().running < 4:
                await asyncio.sleep(0.005)
            before = engine.stats().steps
            got = await answer(engine, prompt_of(0), greedy(1), served.keys[0], "small")
            steps = engine.stats().steps - before
            assert got.ids == alone(served.models[0], prompt_of(0), 1)
            return steps, [one.ids for one in await asyncio.gather(*flood)]

        steps, flooded = asyncio.run(run())
        assert steps <= 5  # and not the 120 that the flood takes
        assert flooded == [alone(served.base, prompt_of(i), 30) for i in range(16)]  # those put back too


def test_tenants_share_by_tokens(tmp_path: Path) -> None:
    order: list[str] = []
    with Served(tmp_path, count=0, max_running=1) as served:

        async def one(tenant: str, i: int) -> None:
            await answer(served.engine, prompt_of(i), greedy(5), None, tenant)
            order.append(tenant)

        async def run() -> None:
            await asyncio.gather(*(one("many", i) for i in range(8)), *(one("few", i) for i in range(3)))

        asyncio.run(run())
    assert order.index("few") <= 2
    assert order[:6].count("few") == 3


# -- ends before the end -----------------------------------------------------------------------------


def test_what_a_request_waited_for_its_turn_is_told(tmp_path: Path) -> None:
    """With one place the second begins when the first has ended; who leaves while it waits has not begun."""
    with Served(tmp_path, count=1, max_running=1) as served:

        async def one(place: int, count: int) -> tuple[Generation, float]:
            asked = Generation(
                id="r", tenant="t", adapter=served.keys[0], prompt=prompt_of(place), sampling=greedy(count)
            )
            began = time.monotonic()
            async for _ in served.engine.generate(asked):
                pass
            return asked, time.monotonic() - began

        async def three() -> tuple[list[tuple[Generation, float]], Generation]:
            runs = [asyncio.ensure_future(one(place, 40)) for place in range(2)]
            await asyncio.sleep(0.02)
            left = Generation(id="r", tenant="t", adapter=None, prompt=(5,), sampling=greedy(3))
            leaving = served.engine.generate(left)
            waiting = asyncio.ensure_future(anext(leaving))
            await asyncio.sleep(0.02)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            return await asyncio.gather(*runs), left

        done, left = asyncio.run(three())
    waits = [asked.waits.queued for asked, _ in done]
    assert None not in waits
    first, second = sorted(zip(waits, (seconds for _, seconds in done)))
    assert first[0] < first[1]
    assert 0.5 * first[1] < second[0] < second[1]
    assert left.waits.queued is None


def test_who_leaves_frees_the_place(served: Served) -> None:
    async def run() -> tuple[int, int]:
        request = Generation(id="x", tenant="t", adapter=served.keys[0], prompt=prompt_of(1), sampling=greedy(200))
        stream: Any = served.engine.generate(request)
        await anext(stream)
        before = served.engine.stats().running
        await stream.aclose()
        until = time.monotonic() + 2.0
        while (now := served.engine.stats().running) and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return before, now

    assert asyncio.run(run()) == (1, 0)


def test_deadlines_hold_for_who_runs_and_who_waits(tmp_path: Path) -> None:
    with Served(tmp_path, count=1, max_running=1) as served:

        async def run() -> list[Any]:
            now = time.monotonic()
            runs = answer(served.engine, prompt_of(1), greedy(240), None, "t", now + 0.15)
            waits = answer(served.engine, prompt_of(2), greedy(240), None, "t", now + 0.1)
            return await asyncio.gather(runs, waits)

        first, second = asyncio.run(run())
        assert first.finish.reason == second.finish.reason == "deadline"
        assert second.finish.completion_tokens == 0
        assert first.ids == alone(served.base, prompt_of(1), 240)[: len(first.ids)]


def test_stopping_lets_what_runs_end_and_cancels_the_rest(tmp_path: Path) -> None:
    served = Served(tmp_path, count=1)
    served.engine.start()

    async def run(drain: float) -> Any:
        task = asyncio.create_task(answer(served.engine, prompt_of(1), greedy(100), served.keys[0], "t"))
        while served.engine.stats().running == 0:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(served.engine.stop, drain)
        return await task

    ended = asyncio.run(run(30.0))
    assert ended.finish.reason == "length"
    assert ended.ids == alone(served.models[0], prompt_of(1), 100)
    assert served.engine.healthy() == "the engine was stopped"
    with pytest.raises(StoreError, match="does not take requests"):
        answers(served.engine, [(prompt_of(1), greedy(1), None, "t")])


def test_stopping_at_once_cancels(tmp_path: Path) -> None:
    served = Served(tmp_path, count=0)
    served.engine.start()

    async def run() -> Any:
        task = asyncio.create_task(answer(served.engine, prompt_of(1), greedy(240), None, "t"))
        while served.engine.stats().running == 0:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(served.engine.stop)
        return await asyncio.wait_for(task, 5)

    assert asyncio.run(run()).finish.reason == "cancelled"


# -- faults ------------------------------------------------------------------------------------------


def test_a_request_that_breaks_a_step_fails_alone(tmp_path: Path) -> None:
    poison = 63
    with Served(tmp_path, count=2) as served:
        embedding = served.registry.model.get_base_model().model.embed_tokens

        def hook(module: Any, args: Any) -> None:
            if bool((args[0] == poison).any()):
                raise RuntimeError("planted")

        handle = embedding.register_forward_pre_hook(hook)
        asked, expected = mixed(served, 6, 8)
        clean = [
            i for i, (one, ids) in enumerate(zip(asked, expected, strict=True)) if poison not in [*one[0], *ids[:-1]]
        ]
        assert len(clean) >= 3
        got = answers(served.engine, [*asked, ((poison, 4), greedy(8), None, "bad")])
        handle.remove()
        assert got[-1].finish.reason == "error"
        assert "RuntimeError" in str(got[-1].finish.error)
        assert [got[i].ids for i in clean] == [expected[i] for i in clean]
        assert served.engine.healthy() is None
        assert answers(served.engine, asked[:1])[0].ids == expected[0]


def whole_adapter(base: Any, seed: int, *names: str) -> PeftModel:
    """A model of its own in which VeRA is beside modules that are trained whole."""
    config = VeraConfig(r=4, target_modules=["down_proj"], modules_to_save=list(names))
    model = get_peft_model(copy.deepcopy(base), config)
    randomize(model, seed=seed, scale=0.5)
    for saved in model.installed("default").saved.values():
        for copied in saved.modules_to_save.values():
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


def put(served: Served, name: str, model: PeftModel, tenant: str = "other") -> AdapterKey:
    version = served.registry.put(tenant, name, model)
    return AdapterKey(tenant, name, version.version, version.sha256)


def test_an_embedding_and_a_head_that_are_trained_whole_are_served_beside_others(tmp_path: Path) -> None:
    """What an adapter brings for the embedding is fed with ids, and what it brings for the head with all tokens."""
    with Served(tmp_path, count=2, kinds=("vera", "lora")) as served:
        model = whole_adapter(served.base, 7, "embed_tokens", "lm_head")
        key = put(served, "whole", model)
        asked, expected = mixed(served, 6, 8)
        own = alone(model, prompt_of(3), 8)
        assert own != alone(served.base, prompt_of(3), 8)
        got = answers(served.engine, [*asked[:3], (prompt_of(3), greedy(8), key, "other"), *asked[3:]])
        assert got[3].ids == own
        assert [one.ids for one in (*got[:3], *got[4:])] == expected
        served.registry.rm("other", "whole")
        assert [one.ids for one in answers(served.engine, asked)] == expected


@pytest.mark.parametrize("first", ["whole", "lora"])
def test_what_one_tenant_put_never_decides_what_another_may_use(first: str, tmp_path: Path) -> None:
    """LoRA on the embedding and an embedding of one's own, by two tenants, whoever came first."""
    with Served(tmp_path, count=2, kinds=("vera", "lora")) as served:
        whole = whole_adapter(served.base, 7, "embed_tokens")
        lora = get_peft_model(copy.deepcopy(served.base), LoraConfig(r=2, target_modules=["embed_tokens"]))
        randomize(lora, seed=3, scale=2.0)
        models = {"whole": whole, "lora": lora.eval()}
        keys = {name: put(served, name, models[name], f"tenant-{name}") for name in (first, *(models.keys() - {first}))}
        asked, expected = mixed(served, 6, 8)
        both = [(prompt_of(3), greedy(8), keys[name], f"tenant-{name}") for name in models]
        got = answers(served.engine, [*both, *asked])
        own = [alone(model, prompt_of(3), 8) for model in models.values()]
        assert own[0] != own[1] != alone(served.base, prompt_of(3), 8)
        assert [one.ids for one in got] == [*own, *expected]
        served.registry.rm(f"tenant-{first}", first)
        assert answers(served.engine, [one for one in both if one[2] != keys[first]])[0].ids in own


@pytest.mark.parametrize("name", ["rotary_emb", "self_attn", "model.layers.0"])
def test_an_adapter_that_cannot_run_is_refused_before_anybody_can_name_it(name: str, tmp_path: Path) -> None:
    """Its rows cannot be told apart in a module of several inputs: that is told when it is put, and nothing stays."""
    with Served(tmp_path, count=2) as served:
        told = "'bad' fits this model, and fails when it runs: .* rows can be told apart where it takes one tensor"
        with pytest.raises(UnsupportedError, match=told):
            put(served, "bad", whole_adapter(served.base, 7, name))
        assert served.registry.versions("other", "bad") == []
        assert not served.registry.residents._wholes
        asked, expected = mixed(served, 4, 6)
        assert [one.ids for one in answers(served.engine, asked)] == expected
        assert served.engine.healthy() is None


def test_who_tries_an_adapter_does_not_wait_for_an_engine_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told that it ends, or not told at all: both are no fault of the adapter."""
    with Served(tmp_path, count=1) as served:
        row = served.registry.row(served.keys[0])
        served.engine._try(row, "t")

        def lost(run: Run) -> None:
            monkeypatch.setattr(served.engine, "_dead", "it fell over")

        def ends(run: Run) -> None:
            run.tell([Finish("cancelled")])

        for send, told in ((ends, "the engine ends"), (lost, "it fell over")):
            monkeypatch.setattr(served.engine, "_send", send)
            with pytest.raises(EngineError, match=told):
                served.engine._try(row, "t")
        monkeypatch.undo()
        served.engine._try(row, "t")


def test_an_adapter_that_fails_when_it_runs_fails_its_own_requests_and_is_taken_out(tmp_path: Path) -> None:
    """More often in a row than any engine would give up after, beside others and by itself."""
    with Served(tmp_path, count=2) as served:
        served.registry.trial = None  # it came to be in the store
        key = put(served, "bad", whole_adapter(served.base, 7, "rotary_emb"))
        asked, expected = mixed(served, 4, 6)
        for _ in range(8):
            got = answers(served.engine, [(prompt_of(1), greedy(4), key, "other")])
            assert got[0].finish.reason == "error"
            assert not served.registry.residents._wholes
        got = answers(served.engine, [*asked, (prompt_of(1), greedy(4), key, "other")])
        assert got[-1].finish.reason == "error"
        assert [one.ids for one in got[:-1]] == expected
        assert served.engine.healthy() is None
        served.registry.rm("other", "bad")
        assert [one.ids for one in answers(served.engine, asked)] == expected


def test_an_engine_whose_base_fails_says_that_it_cannot_answer(tmp_path: Path) -> None:
    with Served(tmp_path, count=1) as served:

        def hook(module: Any, args: Any) -> None:
            raise RuntimeError("planted")

        served.registry.model.get_base_model().model.norm.register_forward_pre_hook(hook)
        got = answers(served.engine, [(prompt_of(1), greedy(4), served.keys[0], "t")])
        assert got[0].finish.reason == "error"
        for _ in range(200):
            if served.engine.healthy() is not None:
                break
            time.sleep(0.01)
        assert "RuntimeError" in str(served.engine.healthy())


def test_when_the_thread_ends_everybody_is_told(tmp_path: Path) -> None:
    with Served(tmp_path, count=1, max_running=2) as served:

        def broken() -> None:
            raise MemoryError("planted")

        async def run() -> list[Any]:
            tasks = [asyncio.create_task(answer(served.engine, prompt_of(i), greedy(200), None, "t")) for i in range(5)]
            while served.engine.stats().running == 0:
                await asyncio.sleep(0.001)
            served.engine._admit = broken  # type: ignore[method-assign]
            return await asyncio.wait_for(asyncio.gather(*tasks), 10)

        got = asyncio.run(run())
        assert {one.finish.reason for one in got} <= {"error", "cancelled"}
        assert "MemoryError" in str(served.engine.healthy())
        with pytest.raises(StoreError):
            answers(served.engine, [(prompt_of(1), greedy(1), None, "t")])


def test_an_adapter_whose_numbers_overflow_spoils_nobody_else(tmp_path: Path) -> None:
    with Served(tmp_path, count=2, max_norm=float("inf")) as served:
        bad = adapter_of(served.base, 5, size=1e30)
        with pytest.raises(
            UnsupportedError, match="'bad' fits this model, and fails when it runs: .* no longer finite"
        ):
            served.registry.put("t", "bad", bad)
        assert served.registry.versions("t", "bad") == []
        served.registry.trial = None  # as for one whose numbers overflow in longer texts only
        version = served.registry.put("t", "bad", bad)
        key = AdapterKey("t", "bad", version.version, version.sha256)
        asked, expected = mixed(served, 6, 8)
        got = answers(served.engine, [*asked[:3], (prompt_of(1), greedy(8), key, "t"), *asked[3:]])
        assert got[3].finish.reason == "error"
        assert "finite" in str(got[3].finish.error)
        assert [one.ids for one in (*got[:3], *got[4:])] == expected


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ((), greedy(4), "at least one token"),
        ((1, 64), greedy(4), "each in 0"),
        ((1,), greedy(256), "at most 256 together"),
        ((1,), Sampling(max_tokens=1, temperature=-1.0), "temperature"),
        ((1,), Sampling(max_tokens=1, top_p=0.0), "top_p"),
        ((1,), Sampling(max_tokens=1, top_k=0), "top_k"),
        ((1,), greedy(4, stop=("x",)), "tokenizer"),
    ],
)
def test_what_cannot_be_asked(served: Served, prompt: tuple[int, ...], sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        answers(served.engine, [(prompt, sampling, None, "t")])


def test_the_start_is_warm_and_small(tmp_path: Path) -> None:
    served = Served(tmp_path, count=0)
    began = time.monotonic()
    served.engine.start()
    assert time.monotonic() - began < 3.0  # transformers' own sizes take 14 s and more
    assert served.engine._batch is not None
    assert served.engine._batch._processor.cache.cache_tensor.nbytes < 64 * 2**20
    batch = served.engine._batch
    assert 0.0 <= batch.used <= 1.0
    served.engine.stop()
    assert batch.used == 0.0  # asked by a thread that does not know yet


def test_the_model_is_as_before_once_stopped(tmp_path: Path) -> None:
    with Served(tmp_path, count=1) as served:
        answers(served.engine, [(prompt_of(1), greedy(2), served.keys[0], "t")])
    plain = served.registry.model.get_base_model()
    assert alone(plain, prompt_of(1), 5) == alone(served.base, prompt_of(1), 5)


def test_finish_is_the_last_thing(served: Served) -> None:
    async def run() -> list[Any]:
        request = Generation(id="x", tenant="t", adapter=None, prompt=prompt_of(1), sampling=greedy(3))
        return [item async for item in served.engine.generate(request)]

    items = asyncio.run(run())
    assert len(items) == 4
    assert isinstance(items[-1], Finish)
