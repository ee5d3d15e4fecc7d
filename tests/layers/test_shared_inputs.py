"""One z for all layers that are fed by one tensor: that it is one, and every way to make it stale that came to mind.

Everything is held to the same model with sharing off: outputs bit for bit, gradients to rounding. The checks are
functions, so that ``test_planted_*`` can show that each of them fails where the guard it is for is taken out.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.layers import shared_inputs as inputs
from kilotune.layers.shared_inputs import SharedInput, join
from kilotune.layers.slot import Slot
from kilotune.projections.matrices import Projections
from tests.support.models import randomize, tiny_gpt2, tiny_llama

INN, RANK = 8, 5

# Layers are called one by one, with backwards between them.
pytestmark = pytest.mark.filterwarnings("ignore::kilotune.UnusedLayersWarning")


class Trio(nn.Module):
    """q, k and v over one input, with different numbers of outputs as in attention with fewer key heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(INN, 12), nn.Linear(INN, 4), nn.Linear(INN, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1).tanh()


def trio(**options: Any) -> PeftModel:
    torch.manual_seed(3)
    model = get_peft_model(Trio(), VeraConfig(**{"r": RANK, "target_modules": ["q", "k", "v"], **options}))
    randomize(model)
    model.set_way("factored")  # the pick needs no z for many rows
    return model.double()


def batch(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (3, INN)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextlib.contextmanager
def unshared() -> Iterator[None]:
    """Every layer makes its own z."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedInput, "z", lambda self, member, x, a, make: make())
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[weakref.ref[Tensor]]]:
    """Weak references to every z that is really made."""
    made: list[weakref.ref[Tensor]] = []
    plain = Slot.first_product

    def watched(self: Slot, x: Tensor, a: Tensor, make: Callable[[], Tensor]) -> Tensor:
        def making() -> Tensor:
            z = make()
            made.append(weakref.ref(z))
            return z

        return plain(self, x, a, making)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slot, "first_product", watched)
        yield made


Body = Callable[[PeftModel, Tensor], Any]


def same(body: Body, made: int | None = None, x: Callable[[], Tensor] = batch, grad: bool = False) -> Any:
    """Run ``body`` with sharing and without, on models and inputs of their own; outputs are equal bit for bit.

    made: how many z are made where there is sharing. grad: x's gradient, and the adapter's, are compared, too.
    """
    results = []
    for sharing in (False, True):
        model, given = trio(), x()
        if grad:
            given.requires_grad_()
        with contextlib.nullcontext() if sharing else unshared(), counted() as products:
            out = body(model, given)
        outputs = [out] if isinstance(out, Tensor) else list(out)
        grads = [p.grad for _, p in model.adapter_parameters()] + [given.grad] if grad else []
        results.append((outputs, grads, len(products)))
    (plain, wanted, _), (shared, got, count) = results
    assert len(plain) == len(shared)
    for one, two in zip(plain, shared):
        assert torch.equal(one, two), "a stale z"
    for one, two in zip(wanted, got):
        assert (one is None) == (two is None), "a gradient is missing"
        assert one is None or torch.allclose(one, two, rtol=1e-12, atol=1e-13), "another gradient"
    assert made is None or count == made, f"{count} products, not {made}"
    return plain


def changed(change: Callable[[Tensor], Any], x: Callable[[], Tensor] = batch) -> None:
    """Nothing of the input before ``change`` is in what comes after it; ``change`` does change the output."""

    def body(model: PeftModel, given: Tensor, doing: Callable[[Tensor], Any] = change) -> list[Tensor]:
        with torch.no_grad():
            return [model.q(given), [doing(given), model.k(given)][1], [doing(given), model.v(given)][1]]

    after = same(body, x=x)
    before = same(lambda model, given: body(model, given, lambda _: None), x=x)
    assert not torch.equal(after[1], before[1]), "the change changed nothing"


# -- one ---------------------------------------------------------------------------------------------------------------


def test_one_product_for_three_layers() -> None:
    same(lambda model, x: model(x), made=1)
    same(lambda model, x: [(y := model(x)), y.square().sum().backward()][:1], made=1, grad=True)
    with torch.no_grad():
        same(lambda model, x: model(x), made=1)
    same(lambda model, x: [model.k(x), model.v(x), model.q(x)], made=1)  # in whatever order
    same(lambda model, x: [model.q(x), model.q(x), model.k(x)], made=2)  # one that is called twice gets a new one
    same(lambda model, x: [model(x), model(x)], made=2)
    same(lambda model, x: [model.q(x), model.k(x.clone()), model.v(x)], made=3)
    same(lambda model, x: [model.q(x.clone()), (y := x * 2, model.k(y))[1], model.v(y)], made=2)  # across


class _Products(TorchDispatchMode):
    """Counts products of (T, in) with the transposed first factor (r, in)."""

    def __init__(self, model: PeftModel, rank: int) -> None:
        super().__init__()
        (holder,) = (m for m in model.modules() if isinstance(m, Projections))
        self.places = {t.untyped_storage().data_ptr() for t in holder.tensors()}
        self.rank, self.count = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[1].untyped_storage().data_ptr() in self.places:
            self.count += args[1].shape[1] == self.rank and args[1].stride(0) == 1  # not the product with a itself
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", ["picked", "factored", "merged", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_llama_makes_four_products_a_block(way: str, training: bool) -> None:
    rank, layers = 7, 2
    model = get_peft_model(tiny_llama(layers=layers), VeraConfig(r=rank, target_modules="all-linear"))
    randomize(model)
    model.set_way(way)
    ids = torch.arange(24).view(2, 12) % 32
    results = []
    for sharing in (True, False):
        with contextlib.nullcontext() if sharing else unshared(), torch.set_grad_enabled(training):
            model.zero_grad()
            with _Products(model, rank) as seen:
                loss = model(input_ids=ids, labels=ids).loss
            if training:
                loss.backward()
            grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), grads, seen.count))
    (loss, grads, count), (wanted, expected, plain) = results
    assert torch.equal(loss, wanted)
    assert len(grads) == len(expected) == (2 * 7 * layers if training else 0)
    for one, two in zip(grads, expected):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5 * float(two.abs().max()))
    if way == "dense" or (way in ("merged", "picked") and not training):  # for so few tokens, that is the pick
        assert count == plain == 0
    else:
        assert (count, plain) == (4 * layers, 7 * layers)


def test_gpt2_makes_a_product_for_each_layer() -> None:
    """c_attn and c_proj have equal first factors, and other inputs."""
    model = get_peft_model(tiny_gpt2(), VeraConfig(r=4, target_modules="all-linear")).eval()
    randomize(model)
    model.set_way("factored")
    ids = torch.arange(24).view(2, 12) % 32
    with counted() as made, torch.no_grad():
        found = model(input_ids=ids).logits
    assert len(made) == 4 * 2
    with unshared(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, found)


def test_who_may_share() -> None:
    made = join([("a.q", 3, 0), ("a.k", 2, 0), ("a.v", 2, 1), ("b.q", 3, 0), ("q", 1, 0), ("a.b.q", 3, 0), ("k", 5, 0)])
    assert set(made) == {"a.q", "a.k", "q", "k"}
    assert made["a.q"][0] is made["a.k"][0] is not made["q"][0]
    assert made["q"][0].outs == (1, 5)
    assert made["q"][0].mean_out == 3
    assert [made[name][1] for name in ("a.q", "a.k", "q", "k")] == [0, 1, 0, 1]
    lora = get_peft_model(Trio(), LoraConfig(r=2, target_modules=["q", "k", "v"]))  # its first factors are its layers'
    assert all(slot.inputs is None for layer in lora.adapted_layers().values() for slot in layer.adapters.values())


# -- changed in place --------------------------------------------------------------------------------------------------


def _out(x: Tensor) -> None:
    torch.mul(x, 1.5, out=x)


def _in_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        x.add_(1)


def _data(x: Tensor) -> None:
    x.data = x.data + 1


def _data_with_its_memory_used_again(x: Tensor) -> None:
    """The input's old memory is freed, given to another tensor, and the input gets that: same address, new numbers."""
    place, shape = x.data_ptr(), x.shape
    x.data = torch.empty(0, dtype=x.dtype)
    tries = [torch.full(shape, 2.5, dtype=x.dtype) for _ in range(64)]
    x.data = next((t for t in tries if t.data_ptr() == place), tries[0])


def _resized(x: Tensor) -> None:
    x.resize_(2, INN)


def _shown_to_numpy(x: Tensor) -> None:
    x.numpy()[...] += 1


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda x: x.add_(1),
    "copy_": lambda x: x.copy_(batch(9, *x.shape)),
    "index_put_": lambda x: x.index_put_((torch.tensor([0]),), torch.tensor(4.0, dtype=x.dtype)),
    "setitem": lambda x: x.__setitem__((0, 0), 5.0),
    "out": _out,
    "foreach": lambda x: torch._foreach_add_([x], 1.0),
    "view": lambda x: x.view(-1)[1:3].mul_(3),
    "detached": lambda x: x.detach().add_(1),
    "inference mode": _in_inference_mode,
    "set_": lambda x: x.set_(batch(9)),
    "data": _data,
    "resize_": _resized,
    "transposed": lambda x: x.t_() if x.shape[0] == x.shape[1] else x.mul_(2),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_changed_in_place(name: str) -> None:
    changed(CHANGES[name])
    if name not in ("set_", "resize_"):
        changed(CHANGES[name], lambda: batch(1, 5, 2 * INN)[:, ::2])  # not contiguous
    if name == "transposed":
        changed(CHANGES[name], lambda: batch(2, INN, INN))


def memory_held() -> None:
    """Whether freed memory is used again is the allocator's choice; that nothing frees it is ours."""
    model, x = trio(), batch()
    memory = StorageWeakRef(x.untyped_storage())
    with torch.no_grad():
        model.q(x)
        x.data = torch.empty(0, dtype=x.dtype)
    assert not memory.expired(), "the memory of an input whose z is kept may be given to another"
    del x
    assert memory.expired(), "held for longer than the input lives"


def test_memory_held() -> None:
    memory_held()


def memory_used_again() -> None:
    for rows in (3, 50, 800, 12800):  # sizes that an allocator treats in its different ways
        for seed in range(5):
            changed(_data_with_its_memory_used_again, lambda rows=rows, seed=seed: batch(seed, rows, INN))


def test_memory_used_again() -> None:
    memory_used_again()


def test_changed_through_its_base() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        part = x[1:]
        first = model.q(part)
        x.mul_(2)
        return [first, model.k(part), model.v(part)]

    with torch.no_grad():
        same(body, made=2)


def written_by_numpy() -> None:
    arrays: list[np.ndarray] = []

    def fresh() -> Tensor:
        arrays.append(np.ones((3, INN)))
        return torch.from_numpy(arrays[-1])

    changed(lambda _: arrays[-1].__iadd__(1), fresh)

    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        shown = x.numpy()
        first = model.q(x)
        shown += 1
        return [first, model.k(x)]

    with torch.no_grad():
        same(body, made=2)


def test_written_by_numpy() -> None:
    written_by_numpy()


def each_forward_takes_a_z_of_its_own() -> None:
    """A write that nobody can notice never matters between two forwards of the model."""

    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        found = []
        for _ in range(3):
            found.append(model(x))
            x.data.add_(1)
        return found

    def one_layer(model: PeftModel, x: Tensor) -> list[Tensor]:
        return [y for _ in range(3) for y in (model.q(x), x.data.add_(1).clone())]

    for forwards in (body, one_layer):
        same(forwards, made=3)
        with torch.no_grad():
            same(forwards, made=3)


def test_each_forward_takes_a_z_of_its_own() -> None:
    each_forward_takes_a_z_of_its_own()


# -- other tensors -----------------------------------------------------------------------------------------------------


def objects_and_memory_used_again() -> None:
    """Inputs that come and go, at addresses and under ids that were others' before."""

    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        found, ids = [], set()
        with torch.no_grad():
            for i in range(40):
                one = x * i
                ids.add(id(one))
                found.append((model.q, model.k, model.v)[i % 3](one))
                del one
        assert len(ids) < 40, "no id was used again, so this tests nothing"
        return found

    for rows in (3, 50, 800, 12800):
        same(body, made=40, x=lambda rows=rows: batch(0, rows, INN))


def test_objects_and_memory_used_again() -> None:
    objects_and_memory_used_again()


def test_cross_attention() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        other = x * 3
        return [y for _ in range(2) for y in (model.q(x), model.k(other), model.v(other))]

    same(body, made=4)
    same(body, made=4, grad=False)


def test_a_block_that_is_used_many_times() -> None:
    def body(model: PeftModel, x: Tensor) -> Tensor:
        for _ in range(4):
            x = model(x)[:, :INN]
        x.sum().backward()
        return x

    same(body, made=4, grad=True)


def test_inputs_that_are_no_plain_matrices() -> None:
    """Sparse and nested inputs, subclasses and parameters run as they did, each layer for itself."""

    class Own(Tensor):
        pass

    kinds: list[tuple[Callable[[], Tensor], int]] = [
        (lambda: batch(0, 2, 3, INN), 1),
        (lambda: batch(0, 0, INN), 1),
        (lambda: batch(0, INN), 1),
        (lambda: batch().as_subclass(Own), 3),
        (lambda: nn.Parameter(batch()), 3),
        (lambda: batch().to("meta"), 1),
    ]
    for make, made in kinds:
        meta = make().device.type == "meta"
        model = trio().to("meta") if meta else trio()
        x = make()
        with counted() as products:
            found = [model.q(x), model.k(x), model.v(x)]
        assert len(products) == made
        assert [y.shape[-1] for y in found] == [12, 4, 4]
    shared = SharedInput((1, 1))
    a = batch(1, RANK, INN)
    odd = [batch().to_sparse(), torch.nested.nested_tensor([batch(), batch()], layout=torch.jagged)]
    with torch.inference_mode():
        odd.append(batch())
    for x in odd:
        made_z = [shared.z(member, x, a, lambda: torch.zeros(1)) for member in (0, 1)]
        assert made_z[0] is not made_z[1]


# -- modes -------------------------------------------------------------------------------------------------------------


def autocast_entered() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        model, x = model.float(), x.float()
        first = model.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            second = model.k(x)
        with torch.autocast("cpu", torch.float16):
            third = model.v(x)
        return [first, second, third]

    same(body, made=3)


def gradients_after_no_grad() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            first = model.q(x)
        second = model.k(x)
        second.square().sum().backward()
        return [first, second]

    same(body, grad=True)

    def back(model: PeftModel, x: Tensor) -> list[Tensor]:
        first = model.k(x)
        with torch.no_grad():
            second = model.q(x)
            assert not second.requires_grad
        with torch.inference_mode():
            third = model.v(x)
        first.square().sum().backward()
        return [first, second, third.clone()]

    same(back, grad=True)


def requires_grad_toggled() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        x.requires_grad_(False)
        first = model.q(x)
        x.requires_grad_(True)
        second = model.k(x)
        (first.sum() + second.square().sum()).backward()
        return [first, second]

    same(body, made=2, grad=True)


def detached_between() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        y = x * 2
        first = model.q(y)
        y.detach_()
        second = model.k(y)
        y.requires_grad_()
        third = model.v(y)
        (second.square().sum() + third.square().sum()).backward()
        return [first, second, third, y.grad]

    same(body, made=3, grad=True)

    def at_once(model: PeftModel, x: Tensor) -> list[Tensor]:
        y = x * 2
        first = model.q(y)
        y.detach_().requires_grad_()
        second = model.k(y)
        second.square().sum().backward()
        return [first, second, y.grad]

    same(at_once, made=2, grad=True)


MODES = (autocast_entered, gradients_after_no_grad, requires_grad_toggled, detached_between)


@pytest.mark.parametrize("check", MODES, ids=lambda check: check.__name__)
def test_modes(check: Callable[[], None]) -> None:
    check()


def test_inference_mode() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            y = x * 1  # its changes cannot be told
            found = [model.q(y), (y.add_(1), model.k(y))[1]]
            found += [model.q(x), model.k(x)]
        with torch.no_grad():
            found.append(model.v(x))
        return [one.clone() for one in found]

    same(body, made=4)


class _Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is nn.functional.linear else result


class _DoublingBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.mm.default else result


def watched_by_a_mode(mode: type[Any]) -> None:
    """A mode that changes what products give is entered, left, and another of its kind entered, between the layers."""

    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            first = model.q(x)
            with mode():
                second = model.k(x)
            with mode():
                third = model.v(x)
        return [first, second, third]

    same(body, made=3)


@pytest.mark.parametrize("mode", [_Doubling, _DoublingBelow])
def test_watched_by_a_mode(mode: type[Any]) -> None:
    watched_by_a_mode(mode)


# -- what is freed -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freed_with_its_input() -> None:
    for grad in (False, True):
        model, x = trio(), batch()
        with counted() as made, no_collector(), torch.set_grad_enabled(grad):
            model.k(x)  # nobody else ever asks
            assert made[0]() is not None, "not kept, so this tests nothing"
            del x
            assert made[0]() is None, "z outlives its input"


def freed_when_all_have_had_it() -> None:
    model, x = trio(), batch()
    with counted() as made, no_collector(), torch.no_grad():
        model(x)
        assert len(made) == 1
        assert made[0]() is None, "z is kept, though nobody can ask for it"
        model.q(x)
        model.q(x)
        assert made[1]() is None, "an old z is kept beside the new one"
        assert made[2]() is not None


def one_at_a_time() -> None:
    """Of all groups of one adapter: an input that lives long (an encoder's output) keeps no z for each layer."""
    torch.manual_seed(0)
    net = nn.ModuleList([Trio() for _ in range(3)])
    model = get_peft_model(net, VeraConfig(r=RANK, target_modules=["q", "k", "v"]))
    x = torch.randn(3, INN)
    with counted() as made, no_collector(), torch.no_grad():
        for part in net:
            part.k(x)
            part.v(x)
        assert len(made) == 3
        assert [one() is not None for one in made] == [False, False, True], "z of other layers are kept"
    del model


def freed_with_the_adapter_and_the_thread() -> None:
    model, x = trio(), batch()
    with counted() as made, no_collector(), torch.no_grad():
        thread = threading.Thread(target=lambda: torch.set_grad_enabled(False) and model.q(x))
        thread.start()
        thread.join()
        assert made[0]() is None, "z of a thread that has ended"
        model.add_adapter("more", VeraConfig(r=3, target_modules=["q", "k", "v"]))
        model.set_adapter("more")
        model.q(x)
        assert made[1]() is not None
        model.delete_adapter("more")
        gc.collect()
        assert made[1]() is None, "z of an adapter that is gone"


def freed_by_the_backward() -> None:
    """Inputs of a step die in the backward, in a thread of autograd's where there is a device."""
    model = trio()
    with counted() as made, no_collector():
        y = model(batch()).sum()
        held = made[0]
        y.backward()
        del y
        assert held() is None

        def elsewhere() -> None:
            x.clear()

        x = [batch()]
        with torch.no_grad():
            model.k(x[0])
        thread = threading.Thread(target=elsewhere)  # the last reference goes in another thread than made it
        thread.start()
        thread.join()
        assert made[1]() is None


FREED = (
    freed_with_its_input,
    freed_when_all_have_had_it,
    one_at_a_time,
    freed_with_the_adapter_and_the_thread,
    freed_by_the_backward,
)


@pytest.mark.parametrize("check", FREED, ids=lambda check: check.__name__)
def test_freed(check: Callable[[], None]) -> None:
    check()


# -- backward ----------------------------------------------------------------------------------------------------------


def backward_between() -> None:
    """A backward through q's output frees z's graph; k needs one that is whole."""

    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        found = []
        for layer in (model.q, model.k, model.v):
            y = layer(x)
            y.square().sum().backward()
            found.append(y)
        return found

    same(body, made=3, grad=True)

    def shifted(model: PeftModel, x: Tensor) -> list[Tensor]:
        y = x + 1  # its node keeps nothing, so the graph above x can be gone through again
        first = model.q(y)
        torch.autograd.grad(first.sum(), x)
        second = model.k(y)
        second.square().sum().backward()
        return [first, second]

    same(shifted, made=2, grad=True)
    for way in ("merged", "dense"):

        def forced(model: PeftModel, x: Tensor, way: str = way) -> list[Tensor]:
            model.set_way(way)
            return body(model, x)

        same(forced, grad=True)


def test_backward_between() -> None:
    backward_between()


def test_second_derivatives() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        y = model(x)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (y.sum() + first.square().sum()).backward()
        return [y]

    same(body, made=1, grad=True)


# -- checkpointing -----------------------------------------------------------------------------------------------------


def _again(function: Callable[..., Any], *args: Tensor, reentrant: bool) -> Any:
    return checkpoint(function, *args, use_reentrant=reentrant)


def _inside(model: PeftModel, x: Tensor, reentrant: bool, names: str, nested: str = "") -> list[Tensor]:
    """q, k and v, those of ``names`` each in a checkpoint, those of capitals all in one, ``nested`` in one in that."""

    def one(name: str) -> Callable[[Tensor], Tensor]:
        layer = model.get_submodule(f"{name}")
        return lambda y: layer(y).tanh()

    together = [name.lower() for name in names if name.isupper()]

    def all_of(y: Tensor) -> tuple[Tensor, ...]:
        return tuple(_again(one(name), y, reentrant=reentrant) if name in nested else one(name)(y) for name in together)

    found: dict[str, Tensor] = {}
    for name in "qkv":
        if name in together:
            if name == together[0]:
                found.update(zip(together, _again(all_of, x, reentrant=reentrant)))
        else:
            found[name] = _again(one(name), x, reentrant=reentrant) if name in names else one(name)(x)
    return [found[name] for name in "qkv"]


SPLITS = [("q", ""), ("k", ""), ("v", ""), ("qk", ""), ("qkv", ""), ("QKV", ""), ("QK", ""), ("KV", ""), ("QKV", "k")]
SPLITS += [("QKV", "qkv"), ("qKV", "v")]


def checkpointed(names: str, nested: str, reentrant: bool) -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        y = x * 2
        found = _inside(base, y, reentrant, names, nested)
        sum(one.square().sum() for one in found).backward()
        return found

    same(body, grad=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("names, nested", SPLITS)
def test_checkpointed(names: str, nested: str, reentrant: bool) -> None:
    checkpointed(names, nested, reentrant)


def test_checkpointed_backward_twice() -> None:
    """What was made again for one backward is not taken in the next."""

    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        y = x * 2
        found = checkpoint(model, y, use_reentrant=False)
        found.sum().backward(retain_graph=True)
        found.square().sum().backward()
        return [found]

    same(body, grad=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_llama_with_gradient_checkpointing(reentrant: bool) -> None:
    ids = torch.arange(24).view(2, 12) % 32
    found = []
    for again in (False, True):
        model = get_peft_model(tiny_llama(), VeraConfig(r=7, target_modules="all-linear")).train()
        model.set_way("factored")
        randomize(model)
        if again:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
            model.get_base_model().enable_input_require_grads()
        with _Products(model, 7) as seen:
            model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert seen.count == (16 if again else 8)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


# -- threads -----------------------------------------------------------------------------------------------------------


def threads_share_a_model() -> None:
    """Eight threads, one model, inputs of their own that they change, and one input for all."""
    model, everybody = trio(), batch(5)
    wanted_all = model(everybody).detach()
    rounds = 60

    def work(seed: int) -> float:
        generator = random.Random(seed)
        worst = 0.0
        with torch.no_grad():
            for i in range(rounds):
                x = batch(seed * rounds + i)
                order = generator.sample(["q", "k", "v"], 3)
                got = {}
                for name in order:
                    if generator.random() < 0.3:
                        x.add_(1)
                    got[name] = (model.get_submodule(name)(x), x.clone())
                for name, (y, given) in got.items():
                    worst = max(worst, float((y - expected(name, given)).abs().max()))
                worst = max(worst, float((model(everybody) - wanted_all).abs().max()))
        return worst

    plain = {name: layer.merged_with(["default"]) for name, layer in model.adapted_layers().items()}
    biases = {name: layer.base_bias() for name, layer in model.adapted_layers().items()}

    def expected(name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, plain[name].weight, biases[name])

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(8))) < 1e-12


def test_threads_share_a_model() -> None:
    threads_share_a_model()


def threads_train_on_one_input() -> None:
    """Each has a graph of its own, whose backward frees nobody else's."""
    model, x = trio(), batch().requires_grad_()
    parameters = [p for _, p in model.adapter_parameters()]

    def work(_: int) -> list[Tensor]:
        found = []
        for layer in (model.q, model.k, model.v):
            found += torch.autograd.grad(layer(x).square().sum(), [x, *parameters], allow_unused=True)
        return [one for one in found if one is not None]

    wanted = work(0)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(200)):
            assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_threads_train_on_one_input() -> None:
    threads_train_on_one_input()


def test_replicas_in_threads() -> None:
    """As in nn.DataParallel: shallow copies of the modules, which share whatever is no parameter."""
    model = trio()
    layers = {name: copy.copy(layer) for name, layer in model.adapted_layers().items()}

    def work(seed: int) -> bool:
        x = batch(seed)
        with torch.no_grad():
            return all(torch.equal(layer(x), model.get_submodule(name)(x)) for name, layer in layers.items())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def test_coroutines_take_turns() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        async def run(y: Tensor) -> list[Tensor]:
            found = []
            for layer in (model.q, model.k, model.v):
                found.append(layer(y))
                await asyncio.sleep(0)
                y.add_(1)
            return found

        async def both() -> list[list[Tensor]]:
            return await asyncio.gather(run(x), run(x), run(x.clone()))

        with torch.no_grad():
            return [y for found in asyncio.run(both()) for y in found]

    same(body)


# -- the model changes -------------------------------------------------------------------------------------------------


def _cast(model: PeftModel) -> None:
    model.to(torch.bfloat16)
    model.double()


def _grown(model: PeftModel) -> None:
    model.add_adapter("wider", VeraConfig(r=4 * RANK, target_modules=["q", "k", "v"]))
    model.set_adapter(["wider", "default"])
    model.double()


def _switched(model: PeftModel) -> None:
    model.add_adapter("other", VeraConfig(r=RANK, target_modules=["q", "k", "v"], projection_prng_key=7))
    model.set_adapter("other")
    randomize(model, "other", seed=4)
    model.double()


def _replaced(model: PeftModel) -> None:
    _switched(model)
    model.delete_adapter("default")


def _other_matrix(model: PeftModel) -> None:
    (holder,) = (m for m in model.modules() if isinstance(m, Projections))
    for tensor in holder.tensors():
        tensor.mul_(2)  # nobody does: they are frozen


MODEL_CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "cast": _cast,
    "grown": _grown,
    "switched": _switched,
    "replaced": _replaced,
    "other matrix": _other_matrix,
    "merged": lambda model: model.merge_adapter(),
    "way": lambda model: model.set_way("merged"),
    "trained": lambda model: randomize(model, seed=8),
    "copied": lambda model: (copy.deepcopy(model)(batch(2)), pickle.loads(pickle.dumps(model))(batch(2))),  # noqa: S301
}


def model_changed(name: str) -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            first = model.q(x)
            MODEL_CHANGES[name](model)
            return [first, model.k(x), model.v(x), model.q(x)]

    same(body)


@pytest.mark.parametrize("name", list(MODEL_CHANGES))
def test_model_changed(name: str) -> None:
    model_changed(name)


def test_double_and_its_input_between() -> None:
    model = trio().float()
    x = batch().float()
    model.q(x)
    model.double()
    y = x.double()
    with unshared():
        wanted = model.k(y)
    assert torch.equal(model.k(y), wanted)


def test_functional_call_between() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        moved = {name: p * 2 for name, p in model.named_parameters() if ".adapters." in name}
        assert moved
        first = model.q(x)
        second = torch.func.functional_call(model, moved, (x,))
        return [first, second, model.k(x)]

    same(body)


def test_copies_share_among_themselves() -> None:
    model, x = trio(), batch()
    model.q(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        groups = [
            {id(layer.slot("default").inputs[0]) for layer in one.adapted_layers().values()} for one in (model, twin)
        ]
        assert [len(found) for found in groups] == [1, 1]
        assert groups[0] != groups[1]
        with counted() as made:
            found = twin(x)
        assert len(made) == 1
        assert torch.equal(found, model(x))


def test_several_adapters() -> None:
    """Of one rank and of several, from one seed and from two: each has a z of its own, made once."""
    results = []
    for sharing in (True, False):
        torch.manual_seed(3)
        model = get_peft_model(Trio(), VeraConfig(r=RANK, target_modules=["q", "k", "v"]))
        model.add_adapter("same", VeraConfig(r=RANK, target_modules=["q", "k", "v"]))
        model.add_adapter("wide", VeraConfig(r=2 * RANK, target_modules=["q", "v"]))
        model.add_adapter("other", VeraConfig(r=RANK, target_modules=["q", "k", "v"], projection_prng_key=5))
        model.add_adapter("trained", LoraConfig(r=3, target_modules=["k", "v"]))
        model.double()
        names = ["default", "same", "wide", "other", "trained"]
        for seed, name in enumerate(names):
            randomize(model, name, seed)
        model.set_adapter(names)
        x = batch().requires_grad_()
        with contextlib.nullcontext() if sharing else unshared(), counted() as made:
            y = model(x)
            y.square().sum().backward()
        results.append((y, [p.grad for p in model.parameters() if p.grad is not None], x.grad, len(made)))
    (y, grads, dx, count), (wanted, expected, dx2, plain) = results
    assert torch.equal(y, wanted)
    assert torch.allclose(dx, dx2, rtol=1e-12, atol=1e-12)
    assert len(grads) == len(expected) == 2 * (3 + 3 + 2 + 3 + 2)
    assert all(torch.allclose(one, two, rtol=1e-12, atol=1e-12) for one, two in zip(grads, expected))
    assert plain - count == 2 + 2 + 1 + 2


def test_dora_over_vera() -> None:
    results = []
    for sharing in (True, False):
        torch.manual_seed(3)
        model = get_peft_model(Trio(), VeraConfig(r=RANK, target_modules=["q", "k", "v"], use_dora=True))
        randomize(model)
        x = torch.randn(3, INN, generator=torch.Generator().manual_seed(0))
        with contextlib.nullcontext() if sharing else unshared(), counted() as made:
            results.append((model(x), len(made)))
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1], results[1][1]) == (1, 3)


# -- it goes wrong half-way --------------------------------------------------------------------------------------------


def test_interrupted() -> None:
    shared, x, a = SharedInput((1, 1, 1)), batch(), batch(1, RANK, INN)

    def fail() -> Tensor:
        raise KeyboardInterrupt

    wanted = x @ a.T
    shared.z(0, x, a, lambda: torch.zeros(1))
    x.add_(1)
    with pytest.raises(KeyboardInterrupt):
        shared.z(1, x, a, fail)
    assert torch.equal(shared.z(1, x, a, lambda: x @ a.T), x @ a.T)
    assert not torch.equal(x @ a.T, wanted)
    taken = shared.z(2, x, a, fail)  # made by 1, so nothing is asked for
    assert torch.equal(taken, x @ a.T)


def test_an_exception_between_the_layers() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        def stop(*_: Any) -> None:
            raise KeyError("stop")

        with torch.no_grad():
            handle = model.k.base_layer.register_forward_hook(stop)
            with pytest.raises(KeyError):
                model(x)
            handle.remove()
            x.add_(1)
            return [model(x), model(x)]

    same(body)


def test_one_layer_inside_another() -> None:
    """q's forward hook runs k, and making a z runs another layer of the group."""

    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        inner: list[Tensor] = []
        handle = model.q.register_forward_hook(lambda *_: inner.append(model.k(x)))
        found = [model.q(x), model.v(x)]
        handle.remove()
        return [*found, *inner]

    same(body, made=1)
    shared, x, a = SharedInput((1, 1, 1)), batch(), batch(1, RANK, INN)

    def nested() -> Tensor:
        shared.z(1, x, a, lambda: x @ a.T)
        return x @ a.T

    assert torch.equal(shared.z(0, x, a, nested), x @ a.T)
    assert torch.equal(shared.z(2, x, a, nested), x @ a.T)


# -- compilers and tracers ---------------------------------------------------------------------------------------------


def _counting(rank: int, counts: list[int]) -> Callable[[torch.fx.GraphModule, Any], Any]:
    from functorch.compile import make_boxed_func

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        shapes = [n.meta["val"].shape for n in graph.graph.nodes if n.target is torch.ops.aten.mm.default]
        counts.append(sum(tuple(shape) == (3, rank) for shape in shapes))
        return make_boxed_func(graph.forward)

    return count


@pytest.mark.parametrize("way", ["factored", "merged"])
def test_compiled_makes_one_product(way: str) -> None:
    """The compiler's own search for equal products finds it: autograd's partitioner, as inductor runs it."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    counts: list[int] = []
    count = _counting(RANK, counts)
    backend = aot_autograd(fw_compiler=count, bw_compiler=count, partition_fn=min_cut_rematerialization_partition)
    model, x = trio(), batch().requires_grad_()
    model.set_way(way)
    wanted = model(x)
    found = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    found.sum().backward()
    assert counts[0] == 1


def part_compiled() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        torch._dynamo.reset()
        first = model.q(x)
        second = torch.compile(model.k, backend="eager", fullgraph=True)(x)
        x.data.add_(1)
        return [first, second, torch.compile(model.k, backend="eager", fullgraph=True)(x)]

    results = []
    for sharing in (True, False):
        with contextlib.nullcontext() if sharing else unshared(), torch.no_grad():
            results.append(body(trio(), batch()))
    assert all(torch.allclose(one, two, rtol=1e-12) for one, two in zip(*results, strict=True))


def test_part_compiled() -> None:
    part_compiled()


def traced() -> None:
    """A graph that was recorded after q ran on the very tensor it was recorded with holds no z of q's."""
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x, other = trio(), batch(), batch(6)
    with torch.no_grad():
        wanted = model.k(other)
        model.q(x)
        recorded = make_fx(lambda y: model.k(y))(x)
        assert torch.allclose(recorded(other), wanted, rtol=1e-12, atol=1e-12), "a z is part of the graph"
        model.q(x)
        recorded = make_fx(lambda y: model.k(y), pre_dispatch=True)(x)
        assert torch.allclose(recorded(other), wanted, rtol=1e-12, atol=1e-12), "a z is part of the graph"


def test_traced() -> None:
    traced()


def test_jit_traced() -> None:
    model, x, other = trio(), batch(), batch(6)
    with torch.no_grad():
        wanted = model.k(other)
        model.q(x)
        with pytest.warns(DeprecationWarning, match="trace"):
            recorded = torch.jit.trace(model.k, (x,), check_trace=False)
        assert torch.allclose(recorded(other), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    model, x, other = trio(), batch(), batch(6)
    with torch.no_grad():
        wanted = model(other)
        model.q(x)
        program = torch.export.export(model, (x,), strict=strict)
        assert torch.allclose(program.module()(other), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_function_transforms() -> None:
    def body(model: PeftModel, x: Tensor) -> list[Tensor]:
        first = model.q(x)
        second = torch.func.vmap(model.k)(x)
        third = torch.func.grad(lambda y: model.v(y).square().sum())(x)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            model.q(dual)
            fourth = torch.autograd.forward_ad.unpack_dual(model.k(dual)).tangent
        return [first, second, third, fourth]

    same(body)


# -- anything ----------------------------------------------------------------------------------------------------------


def _step(choose: random.Random, model: PeftModel, tensors: list[Tensor]) -> Tensor:
    """Change something, perhaps, and run one layer; perhaps a backward through it."""
    y = choose.choice(tensors)
    layer = model.get_submodule(choose.choice("qkv"))
    step = choose.randrange(12)
    with torch.no_grad():
        if step == 0:
            y.add_(1)
        elif step == 1:
            y[0].mul_(2)
        elif step == 2:
            tensors[choose.randrange(3)] = y.clone()
        elif step == 3:
            randomize(model, seed=choose.randrange(9))
    if step == 4 and y.is_leaf:
        y.requires_grad_(not y.requires_grad)
    with torch.set_grad_enabled(choose.random() < 0.5):
        if step == 5:
            out = checkpoint(layer, y, use_reentrant=False)
        else:
            with torch.inference_mode(step == 6):
                out = layer(y)
    if out.requires_grad and step in (7, 8, 9):
        out.sum().backward()
    return out.detach().clone()


def random_programs(seeds: range) -> None:
    """Random programs over three inputs, two of them in one memory, with changes, modes and backwards between."""
    for seed in seeds:
        results = []
        for sharing in (False, True):
            choose, model, x = random.Random(seed), trio(), batch()
            tensors = [x, x.view(-1).view(3, INN), x.clone()]
            with contextlib.nullcontext() if sharing else unshared():
                found = [_step(choose, model, tensors) for _ in range(25)]
            results.append([*found, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)])
        for one, two in zip(*results, strict=True):
            assert torch.allclose(one, two, rtol=1e-12, atol=1e-12), f"program {seed}"


def test_random_programs() -> None:
    random_programs(range(30))


@pytest.mark.full
@pytest.mark.timeout(900)  # minutes of work, and more beside other work
def test_many_random_programs() -> None:
    random_programs(range(30, 2000))


# -- the guards, taken out one by one ----------------------------------------------------------------------------------


def another_matrix() -> None:
    """A group whose members' matrices differ after all, and one whose matrix is replaced between two calls."""
    shared, x = SharedInput((1, 1)), batch()
    one, two = batch(1, RANK, INN), batch(2, RANK, INN)
    assert torch.equal(shared.z(0, x, one, lambda: x @ one.T), x @ one.T)
    assert torch.equal(shared.z(1, x, two, lambda: x @ two.T), x @ two.T), "another matrix's z"


def test_another_matrix() -> None:
    another_matrix()


def _without(*places: int) -> Callable[[Tensor], tuple[Any, ...]]:
    plain = inputs._place
    return lambda tensor: tuple(value for i, value in enumerate(plain(tensor)) if i not in places)


def _stateless(drop: Callable[[tuple[Any, ...]], tuple[Any, ...]], watchers: bool = True) -> Callable[..., Any]:
    plain = inputs._state_of

    def state_of(x: Tensor, a: Tensor) -> Any:
        state = plain(x, a)
        return None if state is None else inputs._State(drop(state.values), state.watchers if watchers else ())

    return state_of


def _modes_without(place: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda values: (tuple(v for i, v in enumerate(values[0]) if i != place), *values[1:])


def _graphless(place: int) -> Callable[..., Any]:
    """All but one of what is known of the input's place in the graph."""
    return _stateless(lambda v: (v[0], v[1] and v[1][1 - place], *v[2:]))


def _keep_memory_loose(self: Any, group: Any, member: int, z: Tensor, a: Tensor, memory: Any, state: Any) -> None:
    plain_made(self, group, member, z, a, memory, state)
    self.held = (a,)


def _serves_everybody(self: Any, group: Any, member: int, x: Tensor, state: Any) -> bool:
    return self.group is group and self.source() is x and not self.spent and self.state.equals(state)


def _serves_spent(self: Any, group: Any, member: int, x: Tensor, state: Any) -> bool:
    same = self.group is group and self.source() is x
    return same and member not in self.served and self.state.equals(state)


def _serves_by_state(self: Any, group: Any, member: int, x: Tensor, state: Any) -> bool:
    return self.group is group and member not in self.served and self.state.equals(state)


def _keep_in_a_cycle(self: Any, made: Any, x: Tensor) -> None:
    def forget(_: Any) -> None:
        if self.made is made:
            self.made = None

    made.source = weakref.ref(x, forget)
    self.made = made


def _keep_for_good(self: Any, made: Any, x: Tensor) -> None:
    made.source, self.made = weakref.ref(x), made


class _EveryThreads:
    def __init__(self) -> None:
        self.kept = inputs._Kept()


def _apart(layers: Any) -> dict[str, tuple[SharedInput, int]]:
    found = join(layers)
    alone = {shared: SharedInput(shared.outs) for shared, _ in found.values()}
    return {name: (alone[shared], place) for name, (shared, place) in found.items()}


plain_made = inputs._Made.__init__
CHANGED = {name: lambda change=change: changed(change) for name, change in CHANGES.items()}
# What is taken out: (where, its name, what stands there instead), and the check that must fail without it.
PLANTED: dict[str, tuple[Any, str, Any, Callable[[], Any]]] = {
    "version": (inputs, "_place", _without(1), CHANGED["add_"]),
    "version in inference mode": (inputs, "_place", _without(1), CHANGED["inference mode"]),
    "place": (inputs, "_place", _without(0), CHANGED["data"]),
    "memory held": (inputs._Made, "__init__", _keep_memory_loose, memory_held),
    "whose memory": (inputs, "_tellable", lambda x, a: True, written_by_numpy),
    "once each": (inputs._Made, "serves", _serves_everybody, each_forward_takes_a_z_of_its_own),
    "the matrix": (inputs, "_state_of", _stateless(lambda values: values[:3]), another_matrix),
    "its version": (inputs, "_state_of", _stateless(lambda v: v[:3]), lambda: model_changed("other matrix")),
    "gradient mode": (inputs, "_state_of", _stateless(lambda v: (v[0], *v[2:])), gradients_after_no_grad),
    "autocast": (inputs, "_state_of", _stateless(_modes_without(1)), autocast_entered),
    "requires_grad": (
        inputs,
        "_state_of",
        _graphless(0),
        requires_grad_toggled,
    ),
    "leaf": (inputs, "_state_of", _graphless(1), detached_between),
    "spent": (inputs._Made, "serves", _serves_spent, backward_between),
    "never freed": (inputs._Kept, "keep", _keep_for_good, freed_with_its_input),
    "a cycle": (inputs._Kept, "keep", _keep_in_a_cycle, freed_when_all_have_had_it),
    "threads": (inputs, "_Last", _EveryThreads, threads_train_on_one_input),
    "checkpoint": (inputs, "_state_of", _stateless(lambda v: v, False), lambda: checkpointed("k", "", False)),
    "nested checkpoint": (
        inputs,
        "_state_of",
        _stateless(lambda v: v, False),
        lambda: checkpointed("QKV", "k", False),
    ),
    "function mode": (inputs, "_state_of", _stateless(lambda v: v, False), lambda: watched_by_a_mode(_Doubling)),
    "dispatch mode": (inputs, "_state_of", _stateless(lambda v: v, False), lambda: watched_by_a_mode(_DoublingBelow)),
    "tracer": (inputs, "_state_of", _stateless(lambda v: v, False), traced),
    "random: version": (inputs, "_place", _without(1), lambda: random_programs(range(30))),
    "random: spent": (inputs._Made, "serves", _serves_spent, lambda: random_programs(range(30))),
}


@pytest.mark.parametrize("name", list(PLANTED))
def test_planted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, instead, check = PLANTED[name]
    monkeypatch.setattr(where, what, instead)
    with pytest.raises((AssertionError, RuntimeError)):
        check()


def test_planted_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs._Made, "serves", _serves_by_state)
    monkeypatch.setattr(inputs._Kept, "keep", _keep_for_good)
    monkeypatch.setattr(inputs._Made, "__init__", _keep_memory_loose)
    with pytest.raises(AssertionError):
        objects_and_memory_used_again()


def test_planted_a_place_for_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilotune.injection.inject.join", _apart)
    with pytest.raises(AssertionError, match="z of other layers are kept"):
        one_at_a_time()
