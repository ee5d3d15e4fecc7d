"""A step's tokens, and the cache, are shared: no prompt waits for another's, and a prompt read in parts is the same."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilotune import LoraConfig
from kilotune.serve.engine import pace
from kilotune.serve.engine.cache_room import CacheRoom
from kilotune.serve.engine.device_adapters import GoneError, Held, Row
from kilotune.serve.engine.fairness import Unread, share_out
from kilotune.serve.engine.pace import Pace
from kilotune.serve.engine.paged_attention import PagedBatch, PageSizes
from tests.support.serve_support import Answer, Served, alone, answer, answers, base_model, greedy, prompt_of

# -- how a step is shared out ------------------------------------------------------------------------


def level(wants: Sequence[float], tokens: float) -> list[float]:
    """Max-min fairness by its definition: the water level under which all of it is used."""
    low, high = 0.0, max(wants)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(want, middle) for want in wants) < tokens else (low, middle)
    return [min(want, high) for want in wants]


def test_tenants_have_equal_parts_of_a_step_and_what_one_does_not_need_is_the_others() -> None:
    chance = random.Random(0)
    for _ in range(300):
        count = chance.randint(1, 12)
        prompts = [Unread(str(i), f"t{chance.randint(0, 4)}", chance.choice([1, 7, 300, 6000])) for i in range(count)]
        tokens = chance.choice([count, 64, 512])
        given = share_out(prompts, tokens)
        assert sum(given.values()) == min(tokens, sum(prompt.tokens for prompt in prompts))
        assert all(0 <= given[prompt.id] <= prompt.tokens for prompt in prompts)
        tenants = sorted({prompt.tenant for prompt in prompts})
        wants = [sum(prompt.tokens for prompt in prompts if prompt.tenant == tenant) for tenant in tenants]
        for tenant, fair in zip(tenants, level(wants, tokens), strict=True):
            own = [prompt for prompt in prompts if prompt.tenant == tenant]
            part = sum(given[prompt.id] for prompt in own)
            assert abs(part - fair) < 1
            assert part > 0
            assert given[own[0].id] >= min(own[0].tokens, part / 2), "the oldest one goes on"
            short = min(own, key=lambda prompt: prompt.tokens)
            assert given[short.id] >= min(short.tokens, part // 2), "and so does the shortest one"


def test_equal_prompts_of_one_tenant_are_read_one_after_the_other() -> None:
    """Side by side all of them would be late."""
    prompts = [Unread(str(i), "t", 600) for i in range(4)]
    assert share_out(prompts, 512) == {"0": 512, "1": 0, "2": 0, "3": 0}
    assert share_out([prompts[0]._replace(tokens=88), *prompts[1:]], 512) == {"0": 88, "1": 424, "2": 0, "3": 0}


def test_a_step_has_as_many_tokens_as_the_time_allows() -> None:
    found = Pace(512)
    assert found.tokens(1) == found.tokens(9) == 512, "of which nothing is known"
    found.took(500, 500 * 1e-3)
    assert (found.tokens(1), found.tokens(2)) == (512, 250)
    found.took(3, 3.0)  # of few tokens, which tells nothing
    found.took(250, 250 * 3e-3)
    assert (found.tokens(1), found.tokens(2)) == (375, 125)
    for _ in range(40):
        found.took(100, 100.0)
    assert (found.tokens(1), found.tokens(2)) == (pace.ALONE.least, pace.TOGETHER.least), "a slow model goes on"
    for _ in range(40):
        found.took(64, 1e-5)
    assert found.tokens(3) == 512
    few = Pace(16)
    few.took(16, 160.0)
    assert few.tokens(1) == few.tokens(2) == 16


# -- the cache ---------------------------------------------------------------------------------------


def test_short_requests_have_room_beside_long_ones_and_long_ones_have_their_turn() -> None:
    """Whoever comes, and however long they run: a simulation, with the worst that may come."""
    room = CacheRoom(16 * 2048, 16)
    assert room.longest == 16 * 1536
    assert (room.size(15), room.size(16)) == (1, 2)
    running: list[int] = []
    while room.fits(300, running, False):
        running.append(300)
    assert sum(running) == 1500
    assert room.fits(64, running, False), "a part is left for short ones"
    assert room.fits(64, running, True), "also while a long one waits"
    while room.fits(64, running, True):
        running.append(64)
    assert sum(running) <= room.pages
    assert not room.fits(300, [64] * 4, True), "no other long one goes before one that waits"
    chance = random.Random(1)
    for longest in (65, 300, 1536):
        ends: list[tuple[int, int]] = [(chance.randint(1, 50), 64) for _ in range(28)]  # full of short ones
        for step in range(60):
            ends = [one for one in ends if one[0] > step]
            if room.fits(longest, [size for _, size in ends], False):
                break
            while room.fits(64, [size for _, size in ends], True):  # more of them at every moment
                ends.append((step + 50, 64))
        assert step <= 50


# -- values ------------------------------------------------------------------------------------------


class Reading:
    """Prompts that a batch reads in parts of any size, and how far its numbers are from a plain forward in float64."""

    def __init__(self, model: Any) -> None:
        self.wide, self.chance = copy.deepcopy(base_model()).double(), random.Random(3)
        self.texts: dict[str, list[int]] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.cached: dict[str, int] = {}
        self.sizes: set[int] = set()
        self.worst = 0.0
        sizes = PageSizes(requests=8, batch_tokens=64, cache_tokens=1024, page=8)
        self.batch = PagedBatch(
            model, sizes, lambda name: b"x", lambda parts: contextlib.nullcontext(), self.share, self.choose
        )

    def add(self, **prompts: tuple[int, ...]) -> None:
        for name, prompt in prompts.items():
            self.prompts[name], self.texts[name] = prompt, list(prompt)
            self.batch.add(name, prompt)

    def made(self, name: str) -> list[int]:
        return self.texts[name][len(self.prompts[name]) :]

    def share(self, unread: dict[str, int], room: int) -> dict[str, int]:
        given = {}
        for name, count in unread.items():
            given[name] = min(count, room, self.chance.choice([0, 1, 1, 2, 5, 13, 30]))
            room -= given[name]
        return given if any(given.values()) else {next(iter(unread)): 1}

    def choose(self, names: list[str], logits: Tensor) -> Tensor:
        for name, own in zip(names, logits, strict=True):
            with torch.no_grad():
                right = self.wide(input_ids=torch.tensor([self.texts[name]])).logits[0, -1]
            self.worst = max(self.worst, float((own.double() - right).abs().max()))
            self.texts[name].append(int(own.argmax()))
        return torch.tensor([self.texts[name][-1] for name in names])

    def until(self, name: str, count: int) -> None:
        """Step until this many tokens follow a prompt."""
        while len(self.made(name)) < count:
            for part in self.batch.step():
                self.cached.setdefault(part.id, part.cached)
                self.sizes |= set() if part.last else {part.tokens}


@pytest.mark.parametrize("stock", [False, True], ids=["own attention", "transformers' attention"])
def test_a_prompt_that_is_read_in_parts_has_the_values_of_one_that_is_read_at_once(stock: bool) -> None:
    """Parts of any size, which begin and end anywhere in a page, beside others that generate or share a beginning."""
    base = copy.deepcopy(base_model())
    if stock:
        base.config.sliding_window = 4096  # which our own attention leaves to transformers
    reading, begin = Reading(base), prompt_of(20, 21)
    reading.add(a=prompt_of(1, 150), b=prompt_of(2, 3), c=(*begin, *prompt_of(3, 61)), d=prompt_of(4, 90))
    reading.until("c", 1)
    reading.add(e=(*begin, *prompt_of(5, 40)), f=prompt_of(6, 1))
    for name in reading.prompts:
        reading.until(name, 6)
    reading.batch.close()
    assert {1, 2, 5} < reading.sizes
    assert reading.cached["e"] == (0 if stock else 16)
    assert reading.worst < 2e-5
    for name, prompt in reading.prompts.items():
        assert reading.made(name)[:6] == alone(base_model(), prompt, 6)


def test_long_and_short_prompts_of_many_tenants_give_what_they_give_alone(tmp_path: Path) -> None:
    with Served(tmp_path, count=3, kinds=("vera", "lora"), batch_tokens=16, max_running=8) as served:
        asked, expected = [], []
        for i in range(12):
            prompt = prompt_of(i, (3, 120, 17, 64)[i % 4])
            model, key = (served.base, None) if i % 4 == 3 else (served.models[i % 3], served.keys[i % 3])
            asked.append((prompt, greedy(6), key, f"t{i % 5}"))
            expected.append(alone(model, prompt, 6))
        assert [one.ids for one in answers(served.engine, asked)] == expected


# -- who waits for whom, counted in steps --------------------------------------------------------------


@pytest.fixture
def timeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps have as many tokens as they may, however long they take here."""
    monkeypatch.setattr(Pace, "took", lambda self, tokens, seconds: None)


@asynccontextmanager
async def beside(engine: Any, *asked: tuple[Any, ...]) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """While these requests are there; each step takes 3 ms more."""
    step = engine._batch.step

    def slow() -> Any:
        time.sleep(0.003)
        return step()

    engine._batch.step = slow
    tasks = [asyncio.create_task(answer(engine, *one)) for one in asked]
    before = engine.stats().steps
    while asked and engine.stats().steps < before + 2:
        await asyncio.sleep(0.001)
    yield tasks
    engine._batch.step = step
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def steps(engine: Any, *asked: Any) -> tuple[int, Answer]:
    """(steps until a request has ended, its answer)."""
    before = engine.stats().steps
    async with asyncio.timeout(20):
        got = await answer(engine, *asked)
    return engine.stats().steps - before, got


@pytest.mark.usefixtures("timeless")
@pytest.mark.parametrize("tenant", ["another", "the same"])
def test_a_short_prompt_does_not_wait_for_long_ones(tenant: str, tmp_path: Path) -> None:
    """https://github.com/vllm-project/vllm/issues/10774"""
    with Served(tmp_path, count=1, batch_tokens=16, max_running=8) as served:

        async def run() -> None:
            flood = [(prompt_of(i, 200), greedy(1), None, "flood") for i in range(5)]  # 63 steps
            who = "flood" if tenant == "the same" else "small"
            async with beside(served.engine, *flood) as long:
                for i in range(5):
                    taken, got = await steps(served.engine, prompt_of(i, 6), greedy(1), served.keys[0], who)
                    assert taken <= 3  # the one that runs, its own, and one that may begin meanwhile
                    assert got.ids == alone(served.models[0], prompt_of(i, 6), 1)
                assert not any(task.done() for task in long[1:])
                assert (await long[0]).ids == alone(served.base, prompt_of(0, 200), 1)

        asyncio.run(run())


@pytest.mark.usefixtures("timeless")
def test_what_generates_has_a_token_in_each_step_beside_long_prompts(tmp_path: Path) -> None:
    with Served(tmp_path, count=0, batch_tokens=16, max_running=8) as served:

        async def run() -> None:
            flood = [(prompt_of(i, 200), greedy(1), None, "flood") for i in range(5)]
            async with beside(served.engine, *flood):
                taken, got = await steps(served.engine, prompt_of(9, 6), greedy(20), None, "small")
                assert taken <= 22
                assert got.ids == alone(served.base, prompt_of(9, 6), 20)

        asyncio.run(run())


@pytest.mark.usefixtures("timeless")
def test_a_long_prompt_goes_on_beside_a_flood_of_short_ones(tmp_path: Path) -> None:
    """Of another tenant, and of its own."""
    with Served(tmp_path, count=0, batch_tokens=16, max_running=8) as served:

        async def run(tenant: str) -> None:
            async def flood() -> None:
                while True:
                    await answer(served.engine, prompt_of(1, 14), greedy(1), None, "flood")

            async with beside(served.engine):
                tasks = [asyncio.create_task(flood()) for _ in range(6)]
                taken, _ = await steps(served.engine, prompt_of(2, 160), greedy(1), None, tenant)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert taken <= 24  # 10 alone; half of each step is 20

        for tenant in ("long", "flood"):
            asyncio.run(run(tenant))


@pytest.mark.usefixtures("timeless")
@pytest.mark.parametrize("tenants", [1, 6])
def test_a_short_prompt_has_room_in_a_cache_that_long_ones_fill(tenants: int, tmp_path: Path) -> None:
    """https://github.com/vllm-project/vllm/pull/35852. Of one tenant, or of several with one each."""
    with Served(tmp_path, count=1, batch_tokens=64, max_running=16, cache_tokens=640, page=4) as served:

        async def run() -> None:
            flood = [(prompt_of(i, 150), greedy(30), None, f"flood{i % tenants}") for i in range(6)]
            async with beside(served.engine, *flood) as long:
                for i in range(5):
                    taken, got = await steps(served.engine, prompt_of(i, 6), greedy(2), served.keys[0], "small")
                    assert taken <= 4
                    assert got.ids == alone(served.models[0], prompt_of(i, 6), 2)
                assert served.engine.stats().waiting >= 2
                done = await asyncio.gather(*long)
            assert [one.ids for one in done] == [alone(served.base, prompt_of(i, 150), 30) for i in range(6)]

        asyncio.run(run())


@pytest.mark.usefixtures("timeless")
def test_answers_that_grow_until_the_cache_is_full_keep_nobody_else_waiting(tmp_path: Path) -> None:
    """What goes back to wait is the newest of who has most; before, nothing new ran until one of them had ended."""
    with Served(tmp_path, count=1, max_running=8, cache_tokens=256, page=4) as served:

        async def run() -> None:
            grow = [(prompt_of(i, 30), greedy(70), None, "flood") for i in range(4)]  # 400 tokens in the end
            async with beside(served.engine, *grow) as growing:
                while not all(task.done() for task in growing):
                    taken, got = await steps(served.engine, prompt_of(7, 5), greedy(1), served.keys[0], "small")
                    assert taken <= 6  # 3 or 4, and more where the machine is slow for a moment; 39 before
                    assert got.ids == alone(served.models[0], prompt_of(7, 5), 1)
                done = [await task for task in growing]
            assert [one.ids for one in done] == [alone(served.base, prompt_of(i, 30), 70) for i in range(4)]

        asyncio.run(run())


@pytest.mark.usefixtures("timeless")
def test_a_tenant_that_holds_all_slots_for_adapters_makes_room(tmp_path: Path) -> None:
    with Served(tmp_path, count=3, slots=2, max_running=8) as served:

        async def run() -> None:
            flood = [(prompt_of(i), greedy(50), served.keys[i], "flood") for i in range(2)]
            async with beside(served.engine, *flood) as long:
                taken, got = await steps(served.engine, prompt_of(5), greedy(1), served.keys[2], "small")
                assert taken <= 3
                assert got.ids == alone(served.models[2], prompt_of(5), 1)
                done = await asyncio.gather(*long)
            assert [one.ids for one in done] == [alone(served.models[i], prompt_of(i), 50) for i in range(2)]

        asyncio.run(run())


def test_a_request_whose_adapter_is_read_again_and_then_finds_no_slot_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Served(tmp_path, count=1) as served:
        residents = served.registry.residents
        hold, told = residents.hold, iter([GoneError("it made way"), None, None])

        def held(row: Row) -> Held | None:
            said = next(told, "held")
            if isinstance(said, GoneError):
                raise said
            return None if said is None else hold(row)

        monkeypatch.setattr(residents, "hold", held)
        _, got = asyncio.run(steps(served.engine, prompt_of(1), greedy(4), served.keys[0], "t"))
        assert got.ids == alone(served.models[0], prompt_of(1), 4)


@pytest.mark.usefixtures("timeless")
def test_a_slow_model_has_short_steps_beside_others(tmp_path: Path) -> None:
    """Fewer tokens where another tenant is there, and no fewer than it takes to go on."""
    with Served(tmp_path, count=0, max_running=8) as served:
        served.engine._pace._each = 2e-3
        sizes: list[int] = []
        batch: Any = served.engine._batch
        step = batch.step

        def watched() -> Any:
            parts = step()
            sizes.extend(part.tokens for part in parts if part.tokens > 7)
            return parts

        async def run() -> None:
            async with beside(served.engine, (prompt_of(2), greedy(100), None, "b")):
                await answer(served.engine, prompt_of(3, 200), greedy(1), None, "a")

        batch.step = watched
        served.engine.max_length = 2000
        answers(served.engine, [(prompt_of(1, 700), greedy(1), None, "a")])
        assert sizes == [375, 325]
        sizes.clear()
        asyncio.run(run())
        assert sizes == [125, 75]


def test_a_short_text_of_an_encoder_waits_for_no_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serve.engine.test_encoders import Served as Encoding
    from tests.serve.engine.test_encoders import encoder

    monkeypatch.setattr(Pace, "took", lambda self, tokens, seconds: None)
    with Encoding(tmp_path, encoder(), LoraConfig(r=2, target_modules=["query"])) as served:
        engine = served.engine
        engine._pace._each = 2e-3  # 375 tokens alone, 125 beside others
        sizes: list[int] = []
        forward = engine._forward

        def watched(texts: Sequence[Sequence[int]]) -> Tensor:
            time.sleep(0.01)
            sizes.append(len(texts) * max(map(len, texts)))
            return forward(texts)

        monkeypatch.setattr(engine, "_forward", watched)

        async def run() -> int:
            flood = asyncio.create_task(engine.embed("flood", None, [[3] * 30] * 100))
            while not sizes:
                await asyncio.sleep(0.001)
            before = len(sizes)
            await engine.embed("small", None, [[4, 5]])
            taken = len(sizes) - before
            await flood
            return taken

        assert asyncio.run(run()) <= 2
        assert max(sizes) <= 375
        assert sizes[0] == 360
