"""What code is in: ``disable_adapter()`` of threads, coroutines and generators, left in any order; and compiled code.

tests/conformance/test_threads.py has the same on each kind of layer, test_replay.py what checkpoints run again.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilotune import LoraConfig, MergeError, UnsupportedError, VeraConfig, get_peft_model
from kilotune.model.adapter_model import AdapterModel
from tests.support.models import randomize

X = torch.linspace(-1, 1, 12).view(2, 6)


def made(seed: int = 0) -> tuple[AdapterModel, Tensor, Tensor]:
    """A model, what it gives, and what its base gives."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    expected = base(X).detach()
    model = get_peft_model(base, VeraConfig(r=4, target_modules="all-linear"))
    randomize(model, seed=seed)
    own = run(model)
    assert not torch.allclose(own, expected, atol=1e-3)
    return model, own, expected


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(X)  # type: ignore[no-any-return]


def in_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_two_threads_that_leave_in_turn_leave_nothing_behind() -> None:
    """With one flag for all, the one that entered second would put back what it found."""
    model, own, base = made()
    entered, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with model.disable_adapter():
            entered.set()
            assert go_on.wait(30)
            assert torch.equal(run(model), base)

    with ThreadPoolExecutor(1) as pool:
        with model.disable_adapter():
            done = pool.submit(other)
            assert entered.wait(30)
        assert torch.equal(run(model), own)
        go_on.set()
        done.result()
    assert torch.equal(run(model), own)


def test_a_thread_begins_outside_of_it() -> None:
    model, own, base = made()
    with model.disable_adapter():
        assert torch.equal(in_thread(lambda: run(model)), own)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(run, model)), base)


def test_models_are_disabled_one_by_one() -> None:
    (one, own, base), (two, other, _) = made(), made(seed=1)
    with one.disable_adapter():
        assert torch.equal(run(one), base)
        assert torch.equal(run(two), other)
        with two.disable_adapter():
            assert torch.equal(run(one), run(two))
        assert torch.equal(run(two), other)
    assert torch.equal(run(one), own)


def test_contexts_may_be_left_in_any_order() -> None:
    model, own, base = made()
    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(run(model), base)
    second.__exit__(None, None, None)
    assert torch.equal(run(model), own)
    assert not model._state.opened


def test_a_generator_that_somebody_else_closes_leaves_nothing_behind() -> None:
    model, own, base = made()

    def stream() -> Iterator[Tensor]:
        with model.disable_adapter():
            yield run(model)
            yield run(model)

    generator = stream()
    assert torch.equal(next(generator), base)
    in_thread(generator.close)
    assert torch.equal(run(model), own)
    with model.disable_adapter():
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), own)


def test_a_task_that_outlives_its_context_is_told() -> None:
    model, _, base = made()

    async def late() -> Tensor:
        await asyncio.sleep(0.01)
        return run(model)

    async def main() -> None:
        with model.disable_adapter():
            assert torch.equal(await asyncio.create_task(late()), base)
            task = asyncio.create_task(late())
        with pytest.raises(UnsupportedError, match="has ended; wait for it inside"):
            await task
        with model.disable_adapter():
            task = asyncio.create_task(own_context())
        assert torch.equal(await task, base)

    async def own_context() -> Tensor:
        await asyncio.sleep(0.01)
        with model.disable_adapter():
            return run(model)

    asyncio.run(main())


def test_an_error_inside_ends_it() -> None:
    model, own, _ = made()

    async def main() -> None:
        with pytest.raises(asyncio.CancelledError), model.disable_adapter():
            raise asyncio.CancelledError
        assert torch.equal(run(model), own)

    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(run(model), own)
    asyncio.run(main())


def test_what_is_disabled_cannot_be_copied_or_merged() -> None:
    model, own, _ = made()
    with model.disable_adapter():
        for what in (copy.deepcopy, pickle.dumps):
            with pytest.raises(MergeError, match="copy or save a model inside disable_adapter"):
                what(model)
        with pytest.raises(MergeError, match="merge inside disable_adapter"):
            model.merge_adapter()
        again = in_thread(lambda: copy.deepcopy(model))
        with pytest.raises(MergeError, match="another thread or coroutine is inside"):
            in_thread(model.merge_adapter)
    assert torch.equal(run(again), own)
    with again.disable_adapter():
        assert torch.equal(run(model), own)


def test_a_patched_layer_is_refused_while_merged() -> None:
    model, own, base = made()
    layer = next(iter(model.adapted_layers().values())).base_layer
    real = layer.forward
    layer.forward = lambda x: real(x)  # type: ignore[method-assign]
    with model.disable_adapter():
        assert torch.equal(run(model), base)
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(UnsupportedError, match=r"are merged, and the forward of a Linear"):
        run(model)
    torch.testing.assert_close(run(model), own)


def test_moved_while_merged() -> None:
    """The weights beside the merged ones follow."""
    model, _, base = made()
    model.merge_adapter()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        with model.disable_adapter(), torch.no_grad():
            y = model(X.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), base, rtol=2e-2, atol=2e-2)
    model.unmerge_adapter()


def test_training_mode_is_the_models_while_merged() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + float(self.training)

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(Noisy(6, 5)), LoraConfig(r=2, target_modules=["0"]))
    model.merge_adapter()
    for training in (True, False, True):
        model.train(training)
        with model.disable_adapter(), torch.no_grad():
            bare = nn.Linear.forward(model.adapted_layers()["0"].base_layer, X)  # LoRA starts without a change
            torch.testing.assert_close(model(X), bare + float(training))


# -- compiled ------------------------------------------------------------------------------------------


def compiled(model: AdapterModel, **options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", **options)


def test_one_graph_in_it_and_outside() -> None:
    model, own, base = made()
    code = compiled(model, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(code), own)
        with model.disable_adapter():
            assert torch.equal(run(code), base)
            with model.disable_adapter():
                assert torch.equal(run(code), base)
            assert torch.equal(run(code), base)
        torch.testing.assert_close(run(code), own)


@pytest.mark.parametrize("first", [True, False])
def test_compiled_code_tells_threads_apart(first: bool) -> None:
    model, own, base = made()
    code = compiled(model)

    def disabled() -> None:
        with model.disable_adapter():
            assert torch.equal(run(code), base)

    if first:
        disabled()
    with model.disable_adapter():
        torch.testing.assert_close(in_thread(lambda: run(code)), own)
        assert torch.equal(run(code), base)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(lambda: context.run(run, code)), base)
        in_thread(disabled)
        torch.testing.assert_close(in_thread(lambda: run(code)), own)
        assert torch.equal(run(code), base)
    torch.testing.assert_close(run(code), own)


def test_compiled_code_tells_coroutines_apart() -> None:
    model, own, base = made()
    code = compiled(model)

    async def disabled() -> None:
        with model.disable_adapter():
            for _ in range(3):
                assert torch.equal(run(code), base)
                await asyncio.sleep(0)

    async def plain() -> None:
        for _ in range(4):
            torch.testing.assert_close(run(code), own)
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(disabled(), plain(), disabled())

    asyncio.run(main())
    with model.disable_adapter():
        asyncio.run(disabled())
        assert torch.equal(run(code), base)
    torch.testing.assert_close(run(code), own)


def test_compiled_code_has_the_bases_bits_while_merged() -> None:
    model, own, base = made()
    model.merge_adapter()
    code = compiled(model)
    torch.testing.assert_close(run(code), own)
    with model.disable_adapter():
        assert torch.equal(run(code), base)
    torch.testing.assert_close(run(code), own)


def test_compiled_code_may_disable_by_itself() -> None:
    model, own, base = made()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y = model(x)
        with model.disable_adapter():
            return y, model(x)

    torch.compiler.reset()
    code = torch.compile(both, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            y, z = code(X)
            torch.testing.assert_close(y, own)
            torch.testing.assert_close(z, base)
