"""Gradient checkpointing, when something else runs at the backward than did at the forward: what ran runs again.

Where that cannot be, it is refused: https://github.com/huggingface/peft/issues/2832 tells of gradients that go nowhere.
What is right is what autograd gives without checkpoints.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from kilotune import AdapterConfig, LoraConfig, UnsupportedError, VeraConfig, get_peft_model
from kilotune.layers import active_adapters, replay
from kilotune.model.adapter_model import AdapterModel
from tests.support.models import randomize, tiny_llama

CONFIGS: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=4, target_modules=["up", "down"]),
    "lora": LoraConfig(r=2, target_modules=["up", "down"]),
    "whole": LoraConfig(r=2, target_modules=["up"], modules_to_save=["down"]),
}
KINDS = {"reentrant": True, "other": False}
each_kind = pytest.mark.parametrize("reentrant", list(KINDS.values()), ids=list(KINDS))
each_method = pytest.mark.parametrize("method", CONFIGS)
# torch's, of a reentrant checkpoint in a forward without gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Three blocks, each in a checkpoint where ``reentrant`` is not None."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def model_with(method: str = "vera") -> AdapterModel:
    """Adapters "a" and "b", with values of some size in both; "a" is active."""
    model = get_peft_model(Net().double(), CONFIGS[method], "a")
    model.add_adapter("b", CONFIGS[method])
    for seed, name in enumerate(("a", "b")):
        randomize(model, name, seed=seed)
    return model.double()


Step = Callable[[AdapterModel, Tensor], Any]


def gradients(model: AdapterModel, step: Step, reentrant: bool | None) -> dict[str, Tensor | None]:
    """What one step, which calls backward(), gives the input and both adapters."""
    model.model.reentrant = reentrant
    model.zero_grad()
    x = X.clone().requires_grad_()
    step(model, x)
    found = {f"{name}.{key}": p.grad for name in ("a", "b") for key, p in model.adapter_parameters(name)}
    return {"x": x.grad, **found}


tells = pytest.mark.skipif(replay._top_hooks is None, reason="torch before 2.8")


def equals_plain(step: Step, reentrant: bool, method: str = "vera") -> None:
    model = model_with(method)
    before = copy.deepcopy(model)
    right = gradients(before, step, None)
    assert right["x"] is not None
    torch.testing.assert_close(gradients(model, step, reentrant), right, rtol=1e-10, atol=1e-12)


def refused(step: Step, reentrant: bool, match: str = "the adapters have changed since", method: str = "vera") -> None:
    with pytest.raises(UnsupportedError, match=match):
        gradients(model_with(method), step, reentrant)


# -- other adapters ------------------------------------------------------------------------------------


def _set(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    model.set_adapter("b")
    loss.backward()


def _both_in_one_step(model: AdapterModel, x: Tensor) -> None:
    total = model(x).square().sum()
    model.set_adapter("b")
    (total + model(x).sum()).backward()


def _merged(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    model.merge_adapter()
    loss.backward()


def _unmerged(model: AdapterModel, x: Tensor) -> None:
    model.merge_adapter()
    loss = model(x).square().sum()
    model.unmerge_adapter()
    loss.backward()


def _deleted(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    model.delete_adapter("a")
    loss.backward()


def _replaced(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    model.delete_adapter("a")
    model.add_adapter("a", CONFIGS["vera"])
    model.set_adapter("a")
    loss.backward()


CHANGES = [_set, _both_in_one_step, _merged, _unmerged, _deleted, _replaced]


@each_kind
@pytest.mark.parametrize("step", CHANGES)
def test_other_adapters_than_ran_are_refused(step: Step, reentrant: bool) -> None:
    refused(step, reentrant)


@each_kind
@pytest.mark.parametrize("method", ["lora", "whole"])
def test_so_they_are_of_every_method(method: str, reentrant: bool) -> None:
    refused(_set, reentrant, method=method)
    refused(_both_in_one_step, reentrant, method=method)


@each_kind
@pytest.mark.parametrize("step", [_set, _both_in_one_step])
def test_a_planted_blindness_gives_another_adapters_gradients(
    step: Step, reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(active_adapters.History, "ran", lambda self, number, now: now)
    model = model_with()
    right = gradients(copy.deepcopy(model), step, None)
    found = gradients(model, step, reentrant)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@each_kind
def test_so_they_are_with_transformers_checkpoints(reentrant: bool) -> None:
    ids = torch.arange(12).view(2, 6)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    model.set_adapter("b")
    with pytest.raises(UnsupportedError, match="the adapters have changed since"):
        loss.backward()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.adapter_parameters("b"))
    assert all(p.grad is None for _, p in model.adapter_parameters("a"))


def _there_and_back(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    model.set_adapter("b")
    model.set_adapter("a")
    model.merge_adapter()
    model.unmerge_adapter()
    loss.backward()


def _added(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    model.add_adapter("c", VeraConfig(r=3, target_modules=["up"]))
    loss.backward()


def _in_turns(model: AdapterModel, x: Tensor) -> None:
    for name in ("a", "b", "a", "b"):
        model.set_adapter(name)
        model(x).square().sum().backward()


def _the_other_deleted(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    model.add_adapter("c", CONFIGS["vera"])
    model.delete_adapter("c")
    loss.backward()


@each_kind
@pytest.mark.parametrize("step", [_there_and_back, _added, _in_turns, _the_other_deleted])
def test_what_changes_nothing_is_let_through(step: Step, reentrant: bool) -> None:
    equals_plain(step, reentrant)


# -- disabled ------------------------------------------------------------------------------------------


def _reference_between(model: AdapterModel, x: Tensor) -> None:
    """As direct preference optimisation does."""
    y = model(x)
    with torch.no_grad(), model.disable_adapter():
        reference = model(x)
    (y - reference).square().sum().backward()


def _left_before(model: AdapterModel, x: Tensor) -> None:
    with model.disable_adapter():
        loss = model(x).square().sum()
    loss.backward()


def _all_inside(model: AdapterModel, x: Tensor) -> None:
    with model.disable_adapter():
        model(x).square().sum().backward()


def _entered_after(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    with model.disable_adapter():
        loss.backward()


def _mixed(model: AdapterModel, x: Tensor) -> None:
    y = model(x)
    with model.disable_adapter():
        z = model(x)
        with model.disable_adapter():
            z = z + model(x).sin()
        z = z * model(x)
    (y.square() * z + model(x)).sum().backward()


def _changed_meanwhile(model: AdapterModel, x: Tensor) -> None:
    """The base is the base, whatever is active or merged."""
    with model.disable_adapter():
        loss = model(x).square().sum()
    model.set_adapter("b")
    model.merge_adapter()
    loss.backward()
    model.unmerge_adapter()
    model.set_adapter("a")


def _twice(model: AdapterModel, x: Tensor) -> None:
    with model.disable_adapter():
        z = model(x).square().sum()
    y = model(x).sin().sum()
    z.backward(retain_graph=True)
    y.backward()
    z.backward()


DISABLED = [_reference_between, _left_before, _all_inside, _entered_after, _mixed, _changed_meanwhile, _twice]


@tells
@each_kind
@each_method
@pytest.mark.parametrize("step", DISABLED)
def test_what_was_disabled_is_so_again(step: Step, method: str, reentrant: bool) -> None:
    equals_plain(step, reentrant, method)


@tells
def test_several_models_are_told_apart() -> None:
    one, two = model_with(), model_with("lora")

    def step(model: AdapterModel, x: Tensor) -> None:
        with one.disable_adapter():
            y = two(one(x))
        y = y + one(two(x))
        with two.disable_adapter():
            y = y * two(one(x))
        y.square().sum().backward()

    found = []
    for reentrant in (None, True, False):
        one.model.reentrant = two.model.reentrant = reentrant
        one.zero_grad()
        two.zero_grad()
        x = X.clone().requires_grad_()
        step(one, x)
        found.append([x.grad, *(p.grad for m in (one, two) for _, p in m.adapter_parameters("a"))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


# -- a forward that says itself what it runs -------------------------------------------------------------


def whole(run: Callable[[AdapterModel, Tensor], Tensor], around: bool = False) -> Step:
    """``run`` in one checkpoint; around: and the blocks in theirs."""

    def step(model: AdapterModel, x: Tensor) -> None:
        reentrant = model.model.reentrant
        if reentrant is None:
            y = run(model, x)
        else:
            model.model.reentrant = reentrant if around else None
            y = checkpoint(run, model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        model.model.reentrant = reentrant

    return step


def _first(model: AdapterModel, x: Tensor) -> Tensor:
    with model.disable_adapter():
        y = model(x)
    return model(y)  # type: ignore[no-any-return]


def _last(model: AdapterModel, x: Tensor) -> Tensor:
    y = model(x)
    with model.disable_adapter():
        return model(y)  # type: ignore[no-any-return]


def _between(model: AdapterModel, x: Tensor) -> Tensor:
    y = model(x)
    with model.disable_adapter():
        z = model(y)
    return model(z) * z  # type: ignore[no-any-return]


def _sets(model: AdapterModel, x: Tensor) -> Tensor:
    model.set_adapter("a")
    y = model(x)
    model.set_adapter("b")
    z = model(y)
    model.set_adapter("a")
    return y + z  # type: ignore[no-any-return]


def _routes(model: AdapterModel, x: Tensor) -> Tensor:
    with model.route(["a", "b", None, "a"]):
        y = model(x)
    return model(y)  # type: ignore[no-any-return]


SAYING = [_first, _last, _between]


@tells
@each_kind
@pytest.mark.parametrize("run", [*SAYING, _routes])
def test_what_a_forward_says_itself_is_said_again(
    run: Callable[[AdapterModel, Tensor], Tensor], reentrant: bool
) -> None:
    equals_plain(whole(run), reentrant)


@tells
@pytest.mark.parametrize("run", SAYING)
def test_so_it_is_around_other_checkpoints(run: Callable[[AdapterModel, Tensor], Tensor]) -> None:
    equals_plain(whole(run, around=True), reentrant=True)
    with pytest.raises((UnsupportedError, CheckpointError)):  # never in silence
        equals_plain(whole(run, around=True), reentrant=False)


def test_where_torch_does_not_tell_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch before 2.8 does not."""
    monkeypatch.setattr(replay, "_top_hooks", None)
    for step in (_reference_between, _all_inside, _entered_after, *map(whole, (_first, _between))):
        equals_plain(step, reentrant=False)
    for step in (_left_before, _mixed, _twice, *(whole(_last, around) for around in (False, True))):
        refused(step, reentrant=False, match="before 2.8 does not tell")
    refused(whole(_sets), reentrant=True, match="torch may stop it midway")


@each_kind
def test_a_route_in_it_that_was_left_is_refused(reentrant: bool) -> None:
    with pytest.raises((UnsupportedError, CheckpointError)):
        equals_plain(whole(_routes, around=True), reentrant)


@tells
def test_so_are_its_adapters_where_it_runs_to_its_end() -> None:
    equals_plain(whole(_sets), reentrant=True)
    refused(whole(_sets), reentrant=False, match="torch may stop it midway")


def _ends_with_another(model: AdapterModel, x: Tensor) -> Tensor:
    y = model(x)
    model.set_adapter("b")
    return y + model(x)  # type: ignore[no-any-return]


def test_a_forward_that_ends_with_another_adapter_is_not_begun_with_it() -> None:
    refused(whole(_ends_with_another), reentrant=True)
    refused(whole(_ends_with_another), reentrant=False, match="torch may stop it midway")


# -- routes --------------------------------------------------------------------------------------------

NAMES = ["a", "b", None, "b"]


def _route_around(model: AdapterModel, x: Tensor) -> None:
    with model.route(NAMES):
        model(x).square().sum().backward()


def _plain_in_a_route(model: AdapterModel, x: Tensor) -> None:
    loss = model(x).square().sum()
    with model.route(NAMES):
        loss.backward()


def _outer_and_inner(model: AdapterModel, x: Tensor) -> None:
    with model.route(NAMES):
        y = model(x)
        with model.disable_adapter():
            y = y * model(x)
        y.sum().backward()


@tells
@each_kind
@pytest.mark.parametrize("step", [_route_around, _plain_in_a_route, _outer_and_inner])
def test_a_route_that_is_open_runs_again(step: Step, reentrant: bool) -> None:
    equals_plain(step, reentrant)


def _left_route(model: AdapterModel, x: Tensor) -> None:
    with model.route(NAMES):
        loss = model(x).square().sum()
    loss.backward()


def _plain_after_a_route(model: AdapterModel, x: Tensor) -> None:
    """The last forward had no route, and the first did."""
    with model.route(NAMES):
        loss = model(x).square().sum()
    (loss + model(x).sum()).backward()


def _in_the_next_route(model: AdapterModel, x: Tensor) -> None:
    with model.route(NAMES):
        loss = model(x).square().sum()
    with model.route(NAMES[::-1]):
        (loss + model(x).sum()).backward()


@each_kind
@pytest.mark.parametrize("step", [_left_route, _plain_after_a_route, _in_the_next_route])
def test_a_route_that_was_left_is_refused(step: Step, reentrant: bool) -> None:
    refused(step, reentrant, match="call backward\\(\\) inside the context")


# -- threads and coroutines ----------------------------------------------------------------------------


class Deep(nn.Module):
    """Reentrant checkpoints in one another: below 60, torch runs their backward in threads of its own."""

    def __init__(self, depth: int, threads: set[Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.depth, self.threads = nn.Linear(6, 6), depth, threads

    def forward(self, x: Tensor) -> Tensor:
        return self.level(x, self.depth)

    def level(self, x: Tensor, left: int) -> Tensor:
        if torch._C._current_graph_task_id() != -1:
            self.threads.add(threading.current_thread())
        y = torch.tanh(self.layer(x)) + x
        return y if not left else checkpoint(self.level, y, left - 1, use_reentrant=True)  # type: ignore[no-any-return]


@contextmanager
def _with(model: AdapterModel, place: str) -> Iterator[None]:
    if place == "route":
        with model.route(NAMES):
            yield
    elif place == "disabled":
        with model.disable_adapter():
            yield
    else:
        yield


@pytest.mark.parametrize("place", ["route", "disabled", "nothing"])
def test_threads_of_autograds_own_run_what_ran(place: str) -> None:
    found, threads = [], set[Any]()
    for depth, steps in ((0, 80), (79, 1)):
        model = get_peft_model(Deep(depth, threads).double(), LoraConfig(r=2, target_modules=["layer"]), "a")
        model.add_adapter("b", LoraConfig(r=2, target_modules=["layer"]))
        for seed, name in enumerate(("a", "b")):
            randomize(model, name, seed=seed)
        model.double()
        x = X.clone().requires_grad_()
        with _with(model, place):
            y = x
            for _ in range(steps):
                y = model(y)
            y.sum().backward()
        own = [p.grad for name in ("a", "b") for _, p in model.adapter_parameters(name)]
        found.append([x.grad, *own])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)
    assert any(isinstance(thread, threading._DummyThread) for thread in threads)


@tells
@each_kind
def test_each_thread_has_its_own(reentrant: bool) -> None:
    """Threads train one model at once, some of them disabled, and so often that they are in the midst of it."""
    model = model_with()
    model.model.reentrant = reentrant

    def work(seed: int) -> Tensor:
        x = (X + seed).requires_grad_()
        with _with(model, "disabled" if seed % 2 else "nothing"):
            loss = model(x).square().sum()
        loss.backward()
        assert x.grad is not None
        return x.grad

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(work, range(60)))
    model.model.reentrant = None
    for seed, grad in enumerate(found):
        torch.testing.assert_close(grad, work(seed), rtol=1e-10, atol=1e-12)


@tells
@each_kind
def test_each_coroutine_has_its_own(reentrant: bool) -> None:
    model = model_with()
    model.model.reentrant = reentrant

    async def work(seed: int) -> Tensor | None:
        x = (X + seed).requires_grad_()
        with _with(model, "disabled" if seed % 2 else "nothing"):
            await asyncio.sleep(0)
            y = model(x)
            await asyncio.sleep(0)
            loss = model(y).square().sum()
        await asyncio.sleep(0)
        loss.backward()
        return x.grad

    async def all_at_once() -> list[Tensor | None]:
        return await asyncio.gather(*(work(seed) for seed in range(8)))

    found = asyncio.run(all_at_once())
    model.model.reentrant = None
    torch.testing.assert_close(found, [asyncio.run(work(seed)) for seed in range(8)], rtol=1e-10, atol=1e-12)


@each_kind
def test_a_backward_in_another_thread_than_the_forward(reentrant: bool) -> None:
    model = model_with()
    model.model.reentrant = reentrant

    def forward() -> tuple[Tensor, Tensor]:
        x = X.clone().requires_grad_()
        return x, model(x).square().sum()

    with ThreadPoolExecutor(1) as pool:
        x, loss = pool.submit(forward).result()
        loss.backward()  # nothing has changed
        assert x.grad is not None
        _, loss = pool.submit(forward).result()
        pool.submit(model.set_adapter, "b").result()
        with pytest.raises(UnsupportedError, match="changed"):
            loss.backward()


def test_notes_do_not_grow_where_no_graph_is_made() -> None:
    model = model_with()
    notes = model._state.history._here.notes
    with torch.no_grad():
        for _ in range(100):
            with model.disable_adapter():
                model(X)
            with model.route(NAMES):
                model(X)
            model(X)
    assert len(notes.kept) < 5
    for _ in range(2 * replay.KEPT):
        model.set_adapter("b" if model.active_adapter == "a" else "a")
        X.clone().requires_grad_().sum()
    assert len(notes.kept) == replay.KEPT


def test_a_copy_has_a_history_of_its_own() -> None:
    model = model_with()
    again = copy.deepcopy(model)
    again.set_adapter("b")
    assert model.active_adapter == "a"
    assert model._state.history is not again._state.history
    gradients(again, lambda m, x: m(x).sum().backward(), True)
