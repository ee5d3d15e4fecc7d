"""Threads that tenants share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from kilotune.serve.engine.lanes import Lanes


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.002)


async def run(lanes: Lanes, tenant: str, call: Callable[[], None]) -> None:
    async with lanes.lane(tenant) as lane:
        await lane.run(call)


def test_one_tenant_has_so_many_threads_and_others_pass() -> None:
    lanes = Lanes("test", 4, 2)
    gate, began = threading.Event(), list[str]()

    def slow() -> None:
        began.append("ann")
        assert gate.wait(10)

    async def all_of_them() -> None:
        anns = [asyncio.create_task(run(lanes, "ann", slow)) for _ in range(20)]
        await asyncio.to_thread(until, lambda: len(began) == 2)
        for _ in range(30):
            await asyncio.wait_for(run(lanes, "bob", lambda: began.append("bob")), 5)
        assert began.count("ann") == 2, "ann has her two threads, and bob another one"
        gate.set()
        await asyncio.gather(*anns)

    asyncio.run(all_of_them())
    assert (began.count("ann"), began.count("bob")) == (20, 30)
    lanes.close()


@pytest.mark.parametrize(
    ("threads", "each", "wanted"),
    [(32, 16, {"ann": 16, "bob": 8, "cyd": 4, "dan": 2, "eve": 1, "fay": 1}), (4, 2, {"ann": 2, "bob": 1, "cyd": 1})],
)
def test_who_comes_anew_finds_one_whatever_others_hold(threads: int, each: int, wanted: dict[str, int]) -> None:
    """Each wants very many, one tenant after the other, and keeps what it gets; what ends goes to who has fewest."""
    lanes, held = Lanes("test", threads, each), list[str]()

    async def hold(tenant: str, gate: asyncio.Event) -> None:
        async with lanes.lane(tenant):
            held.append(tenant)
            await gate.wait()

    async def all_of_them() -> None:
        gates = {tenant: asyncio.Event() for tenant in wanted}
        tasks = []
        for tenant, gate in gates.items():
            tasks += [asyncio.create_task(hold(tenant, gate)) for _ in range(40)]
            await asyncio.sleep(0)
        assert {tenant: held.count(tenant) for tenant in wanted} == wanted
        late = asyncio.create_task(hold("gil", asyncio.Event()))
        first = next(task for task in tasks if not task.done())
        first.cancel()
        await asyncio.wait([first])
        for _ in range(20):
            await asyncio.sleep(0)
        assert held[-1] == "gil", "and not one more of those who have several"
        for task in [*tasks, late]:
            task.cancel()
        await asyncio.gather(*tasks, late, return_exceptions=True)

    asyncio.run(all_of_them())
    assert not lanes._taken
    lanes.close()


def test_who_waits_has_his_turn() -> None:
    lanes = Lanes("test", 1, 1)
    order: list[str] = []

    async def all_of_them() -> None:
        async with lanes.lane("ann"):
            tasks = [asyncio.create_task(run(lanes, who, lambda who=who: order.append(who))) for who in "aaaabbc"]  # type: ignore[misc]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())
    assert "".join(order) == "abcabaa"
    lanes.close()


def test_who_leaves_while_waiting_takes_no_place_and_who_leaves_a_call_keeps_the_thread_until_it_ends() -> None:
    lanes = Lanes("test", 1, 1)
    gate, began = threading.Event(), list[str]()

    def slow() -> None:
        began.append("slow")
        assert gate.wait(10)

    async def all_of_them() -> None:
        first = asyncio.create_task(run(lanes, "ann", slow))
        await asyncio.to_thread(until, lambda: began == ["slow"])
        waiting = [asyncio.create_task(run(lanes, who, lambda: began.append("left"))) for who in ("ann", "bob")]
        await asyncio.sleep(0)
        for task in [*waiting, first]:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not lanes._waiting, "nothing is kept of who left"
        late = asyncio.create_task(run(lanes, "ann", lambda: began.append("late")))
        await asyncio.sleep(0.05)
        assert began == ["slow"], "the thread is still at work"
        gate.set()
        await asyncio.wait_for(late, 5)

    asyncio.run(all_of_them())
    assert began == ["slow", "late"]
    assert not lanes._taken
    lanes.close()


def test_several_loops_may_share_them() -> None:
    lanes, count = Lanes("test", 2, 1), list[int]()

    def loop() -> None:
        async def many() -> None:
            await asyncio.gather(*(run(lanes, f"t{i % 3}", lambda: count.append(1)) for i in range(50)))

        asyncio.run(many())

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(count) == 200
    assert not lanes._taken
    lanes.close()
