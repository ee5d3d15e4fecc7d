"""While a pass of training runs, an engine's steps take the cores that are left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from kilotune.serve.engine.cores import Cores, apart, compute_alone
from kilotune.serve.engine.lanes import Lanes


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_a_thread(cores: Cores, inside: threading.Event, leave: threading.Event, found: list[int]) -> threading.Thread:
    def run() -> None:
        with cores.learning():
            found.append(torch.get_num_threads())
            inside.set()
            leave.wait(60)

    made = threading.Thread(target=run)
    made.start()
    assert inside.wait(60)
    return made


@pytest.mark.parametrize(
    ("threads", "training", "alone", "left"), [(4, 1, 4, 3), (2, 1, 2, 1), (1, 1, 1, 1), (2, 2, 1, 1), (8, 2, 7, 6)]
)
def test_steps_take_what_is_left(threads: int, training: int, alone: int, left: int) -> None:
    """Alone, too: the helpers that training's thread keeps are counted, so that all are no more than the cores."""
    cores = Cores(training, threads)
    cores.serve()
    assert torch.get_num_threads() == alone
    inside, leave, found = threading.Event(), threading.Event(), list[int]()
    other = in_a_thread(cores, inside, leave, found)
    cores.serve()
    assert (found, torch.get_num_threads()) == ([training], left)
    leave.set()
    other.join()
    cores.serve()
    assert torch.get_num_threads() == alone


def test_what_is_computed_apart_is_computed_in_a_thread_that_ends() -> None:
    found = apart(threading.current_thread)
    assert found is not threading.current_thread()
    assert not found.is_alive()
    with pytest.raises(KeyError):
        apart(lambda: {}["a"])


def test_what_a_thread_computes_on_is_its_own() -> None:
    """Of torch by itself, a number that is set in one thread is that of all that begin later."""
    torch.set_num_threads(3)

    def alone() -> tuple[int, int]:
        compute_alone()
        (torch.ones(300, 300) @ torch.ones(300, 300)).sum()  # begins to compute
        return torch.get_num_threads(), apart(torch.get_num_threads)

    assert apart(alone) == (1, 3)
    assert (torch.get_num_threads(), apart(torch.get_num_threads)) == (3, 3)
    Cores(1, 4).serve()
    assert (torch.get_num_threads(), apart(torch.get_num_threads)) == (4, 3)


def test_threads_that_tenants_share_compute_alone() -> None:
    torch.set_num_threads(3)
    lanes = Lanes("kilotune-test", 1, 1)

    async def run() -> int:
        async with lanes.lane("a") as lane:
            return await lane.run(torch.get_num_threads)

    assert asyncio.run(run()) == 1
    lanes.close()


def test_a_pass_that_fails_gives_its_cores_back() -> None:
    cores = Cores(1, 3)
    with pytest.raises(KeyError), cores.learning():
        raise KeyError
    cores.serve()
    assert torch.get_num_threads() == 3
