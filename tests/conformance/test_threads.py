"""Each cell in several threads and coroutines, some of them with the adapter disabled: each runs what it says itself.

Two threads take turns at fixed places, so that each meets the other in the midst of what it does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kilotune import AdapterConfig, BitfitConfig, LoraConfig, MergeError, get_peft_model
from kilotune.deltas import LowRank
from kilotune.kinds import attention, biased, embedding, norm
from kilotune.layers import active_adapters
from kilotune.layers.bare import Bare
from kilotune.model.adapter_model import AdapterModel
from tests.conformance.cells import FORMULAS, Cell
from tests.conformance.checks import adapted, data
from tests.conformance.declared import every_cell, every_quantised_cell
from tests.conformance.quantised import INN
from tests.conformance.quantised import Cell as QuantisedCell
from tests.conformance.test_lifecycle import MERGEABLE
from tests.conformance.test_routed import NAMES, ROUTED, two
from tests.support.models import randomize

pytestmark = pytest.mark.filterwarnings("ignore::kilotune.MergePrecisionWarning")  # has its own tests


@contextmanager
def turns(other: Callable[[threading.Barrier], None]) -> Iterator[threading.Barrier]:
    """Inside, ``other`` runs in a second thread; each waits at the barrier for the other."""
    barrier, failed = threading.Barrier(2, timeout=30), list[BaseException]()

    def work() -> None:
        try:
            with torch.no_grad():  # a thread begins with gradients
                other(barrier)
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield barrier
    except threading.BrokenBarrierError as error:
        failed.append(error)  # because of the other's
    except BaseException:
        barrier.abort()
        raise
    finally:
        thread.join()
    if failed:
        raise failed[0]


def each_says_itself(model: AdapterModel, x: Tensor, base: Tensor, own: Tensor) -> None:
    """The base's bits where it is disabled, ``own`` elsewhere, whoever enters or leaves first."""

    def disabled() -> None:
        assert torch.equal(model(x), base)

    def other(barrier: threading.Barrier) -> None:
        with model.disable_adapter():
            disabled()
            barrier.wait()  # 1: the other one is not in it
            barrier.wait()  # 2: both are
            disabled()
            with model.disable_adapter():
                disabled()
            barrier.wait()  # 3
            disabled()
        barrier.wait()  # 4: only the other one is
        assert torch.equal(model(x), own)
        barrier.wait()  # 5

    assert not torch.equal(own, base)
    with turns(other) as barrier:
        barrier.wait()
        assert torch.equal(model(x), own)
        with model.disable_adapter():
            barrier.wait()
            disabled()
            barrier.wait()
            barrier.wait()
            disabled()
            barrier.wait()
    assert torch.equal(model(x), own), "for good"
    assert not model._state.opened


@every_cell("threads")
def test_disabled_in_one_thread_is_not_so_in_another(cell: Cell) -> None:
    model, x = adapted(cell).eval(), data(cell, 4, dtype=torch.float64)
    with torch.no_grad():
        each_says_itself(model, x, cell.base(torch.float64).eval()(x), model(x))


@every_cell("merged threads", MERGEABLE)
def test_so_it_is_while_merged(cell: Cell) -> None:
    """No thread sees the base's weights in the place of the merged ones that it runs."""
    model, x = adapted(cell).eval(), data(cell, 4, dtype=torch.float64)
    model.merge_adapter()
    with torch.no_grad():
        each_says_itself(model, x, cell.base(torch.float64).eval()(x), model(x))
        with turns(lambda barrier: _disabled_for_two_turns(model, barrier)) as barrier:
            barrier.wait()
            with pytest.raises(MergeError, match="another thread or coroutine is inside disable_adapter"):
                model.unmerge_adapter()
            barrier.wait()
    model.unmerge_adapter()


def _disabled_for_two_turns(model: AdapterModel, barrier: threading.Barrier) -> None:
    with model.disable_adapter():
        barrier.wait()
        barrier.wait()


@every_quantised_cell()
def test_so_it_is_where_it_is_quantised(cell: QuantisedCell) -> None:
    model, x = cell.models()[0].eval(), torch.randn(2, 3, INN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        each_says_itself(model, x, base, model(x))
        if cell.case.name in FORMULAS:
            model.merge_adapter()
            each_says_itself(model, x, base, model(x))


@every_cell("routed threads", ROUTED)
def test_a_route_in_one_thread_is_not_one_in_another(cell: Cell) -> None:
    model, x = two(cell, torch.float64), data(cell, 4, dtype=torch.float64)
    with torch.no_grad():
        own, base = model(x), cell.base(torch.float64).eval()(x)
        routed = model(x, adapter_names=NAMES)

        def other(barrier: threading.Barrier) -> None:
            with model.route(NAMES):
                barrier.wait()
                assert torch.equal(model(x), routed)
                barrier.wait()
                with model.disable_adapter():
                    assert torch.equal(model(x), base)
                assert torch.equal(model(x), routed)

        with turns(other) as barrier:
            barrier.wait()
            assert torch.equal(model(x), own)
            with model.disable_adapter():
                assert torch.equal(model(x), base)
                barrier.wait()
                assert torch.equal(model(x), base)


@every_cell("coroutines")
def test_coroutines_say_themselves_too(cell: Cell) -> None:
    model, x = adapted(cell).eval(), data(cell, 4, dtype=torch.float64)

    def run() -> Tensor:
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]

    async def once() -> Tensor:
        await asyncio.sleep(0)
        return run()

    async def disabled(turns: int) -> None:
        with model.disable_adapter():
            for _ in range(turns):
                assert torch.equal(run(), base)
                await asyncio.sleep(0)
            assert torch.equal(await asyncio.to_thread(run), base)
            assert torch.equal(await asyncio.create_task(once()), base)
        assert torch.equal(run(), own)

    async def plain() -> None:
        for _ in range(5):
            assert torch.equal(run(), own)
            await asyncio.sleep(0)
        assert torch.equal(await asyncio.to_thread(run), own)

    async def all_at_once() -> None:
        await asyncio.gather(disabled(1), plain(), disabled(4), plain())

    with torch.no_grad():
        base, own = cell.base(torch.float64).eval()(x), model(x)
    asyncio.run(all_at_once())
    assert torch.equal(run(), own)


# -- in the midst of one layer -------------------------------------------------------------------------


class Meeting:
    """Waits for the other thread before a forward and after it."""

    barrier: threading.Barrier | None = None

    def meet(self) -> None:
        if Meeting.barrier is not None:
            Meeting.barrier.wait()


class AddsBias(nn.Module, Meeting):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        y = x + self.bias
        self.meet()
        return y


class WaitingLayerNorm(nn.LayerNorm, Meeting):
    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        y = super().forward(x)
        self.meet()
        return y


class ScaledEmbedding(nn.Embedding, Meeting):
    def forward(self, x: Tensor) -> Tensor:
        self.meet()
        y = 3.0 * super().forward(x)
        self.meet()
        return y


class WaitingAttention(nn.MultiheadAttention, Meeting):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.meet()
        y: Tensor = super().forward(x, x, x, need_weights=False)[0]
        self.meet()
        return y


MET: dict[str, tuple[Callable[[], nn.Module], AdapterConfig]] = {
    "biased": (AddsBias, BitfitConfig(target_modules=["0"])),
    "norm": (lambda: WaitingLayerNorm(6), BitfitConfig(target_modules=["0"])),
    "embedding": (lambda: ScaledEmbedding(6, 6), LoraConfig(r=2, target_modules=["0"])),
    "attention": (lambda: WaitingAttention(6, 2), LoraConfig(r=2, target_modules=["0"])),
}


@pytest.mark.parametrize("kind", MET)
def test_a_layer_that_runs_with_other_weights_shows_them_to_nobody(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread runs the adapter while another, at the same place in the same layer, runs the base."""
    make, config = MET[kind]
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(make()).double(), config).double()
    randomize(model)
    x = torch.arange(4) if kind == "embedding" else torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        own = model(x)
        with model.disable_adapter():
            base = model(x)

        def other(barrier: threading.Barrier) -> None:
            barrier.wait()
            with model.disable_adapter():
                for _ in range(calls):
                    assert torch.equal(model(x), base)

        calls = 2 if kind == "embedding" else 1  # the table, and the first factor of its change
        with turns(other) as barrier:
            monkeypatch.setattr(Meeting, "barrier", barrier)
            barrier.wait()
            assert torch.equal(model(x), own)
    assert not torch.equal(own, base)


# -- planted faults ------------------------------------------------------------------------------------

LINEAR = next(cell for cell in MERGEABLE if cell.makes is LowRank and cell.kind == "linear")


def test_a_planted_switch_for_all_threads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What disable_adapter() once was."""

    class Everywhere:
        held: object = None

        def get(self, default: object) -> object:
            return self.held or default

        def set(self, value: object) -> None:
            self.held = value

    monkeypatch.setattr(active_adapters, "_HERE", Everywhere())
    with pytest.raises(AssertionError):
        test_disabled_in_one_thread_is_not_so_in_another(LINEAR)


def test_planted_weights_that_are_taken_back_for_all_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(self: Bare, merged: torch.nn.Module, storage: object, kept: dict[str, Tensor], names: object) -> object:
        storage.restore(merged, kept)  # type: ignore[attr-defined]
        return merged

    monkeypatch.setattr(Bare, "of", of)
    with pytest.raises(AssertionError):
        test_so_it_is_while_merged(LINEAR)


@pytest.mark.parametrize("kind", MET)
def test_planted_weights_in_the_module_are_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, biased, embedding, norm):
        monkeypatch.setattr(module, "run_with", functional_call)
    with pytest.raises((AssertionError, RuntimeError)):
        test_a_layer_that_runs_with_other_weights_shows_them_to_nobody(kind, monkeypatch)
