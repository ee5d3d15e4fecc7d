"""The kernel of low-rank layers on plain tensors: every form of every product against the composed form in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from kilotune.kernels import lowrank
from kilotune.kernels.lowrank import Factors, lift, linear, swallowed
from kilotune.kernels.ways import WAYS, Choice, Way

CHOICES = [Choice(*forms) for forms in product((False, True), repeat=3)]
FACTORED, MERGED, DENSE = WAYS[Way.FACTORED], WAYS[Way.MERGED], WAYS[Way.DENSE]
LEAVES = ("x", "a", "b", "mid", "out", "bias")


def named(choice: Choice) -> str:
    """The forms in which a choice differs from all factored."""
    return "+".join(name for name, on in choice._asdict().items() if on) or "factored"


each_choice = pytest.mark.parametrize("choice", CHOICES, ids=named)


@dataclass(frozen=True)
class Case:
    """One layer: which of the vectors there are, and what is trained."""

    tokens: tuple[int, ...] = (2, 3)
    inn: int = 4
    out: int = 5
    rank: int = 3
    trained: frozenset[str] = frozenset({"x", "mid", "out"})
    absent: frozenset[str] = frozenset()
    transposed: bool = False
    dtype: torch.dtype = torch.float64
    size: float = 1.0

    def tensors(self, seed: int = 0) -> dict[str, Tensor | None]:
        """The layer's tensors (x, w, bias, a, b, mid, out) as leaves, None where they are absent."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "x": (*self.tokens, self.inn),
            "w": (self.out, self.inn),
            "bias": (self.out,),
            "a": (self.rank, self.inn),
            "b": (self.rank, self.out) if self.transposed else (self.out, self.rank),
            "mid": (self.rank,),
            "out": (self.out,),
        }
        found: dict[str, Tensor | None] = {}
        for name, shape in shapes.items():
            vector = name in ("mid", "out") and self.dtype in lowrank.NARROW
            value = self.size * torch.randn(shape, generator=generator, dtype=torch.float64)
            value = value.to(torch.float32 if vector else self.dtype)
            value = value.T if name == "b" and self.transposed else value
            found[name] = None if name in self.absent else value.requires_grad_(name in self.trained)
        return found


def run(t: dict[str, Tensor | None], choice: Choice, z: Tensor | None = None, scale: float = 1.5) -> Tensor:
    """What is tested."""
    x, w, a, b = (needed(t[name]) for name in ("x", "w", "a", "b"))
    return linear(x, w, t["bias"], a, Factors(b, t["mid"], t["out"], scale), choice, z)


def composed(t: dict[str, Tensor | None], scale: float = 1.5) -> Tensor:
    """The definition, by torch's own operations in the dtype of what it is given."""
    x, w, a, b = (needed(t[name]) for name in ("x", "w", "a", "b"))
    h = torch.einsum("...i,ki->...k", x, a)
    if t["mid"] is not None:
        h = (h * t["mid"]).to(x.dtype)
    h = torch.einsum("...k,ok->...o", h * scale, b)
    if t["out"] is not None:
        h = (h * t["out"]).to(x.dtype)
    y = torch.einsum("...i,oi->...o", x, w) + h
    return y if t["bias"] is None else y + t["bias"]


def needed(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def wide(t: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same tensors as float64 leaves of their own."""
    return {n: None if v is None else v.detach().double().requires_grad_(v.requires_grad) for n, v in t.items()}


def gradients(y: Tensor, t: dict[str, Tensor | None], g: Tensor) -> dict[str, Tensor]:
    """The gradients of all leaves that want one, by name."""
    leaves = {name: v for name, v in t.items() if v is not None and v.requires_grad}
    if not leaves:
        return {}
    found = torch.autograd.grad(y, list(leaves.values()), g.to(y.dtype), allow_unused=True)
    return {name: needed(value) for name, value in zip(leaves, found)}


def agrees(case: Case, choice: Choice, seed: int = 0) -> None:
    """Output and gradients equal those of the composed form in float64."""
    t = case.tensors(seed)
    exact = wide(t)
    y, expected = run(t, choice), composed(exact)
    g = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    tolerance = 1e-12 if case.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert y.dtype == case.dtype
    assert y.requires_grad == any(v is not None and v.requires_grad for v in t.values())
    found, right = gradients(y, t, g), gradients(expected, exact, g)
    assert found.keys() == right.keys() == {n for n, v in t.items() if v is not None and v.requires_grad}
    for name, value in right.items():
        scale = max(1.0, float(value.abs().max()) if value.numel() else 1.0)
        torch.testing.assert_close(
            found[name].double(), value, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert found[name].dtype == needed(t[name]).dtype


def presences(trained_a: bool) -> Iterator[tuple[frozenset[str], frozenset[str]]]:
    """(trained, absent) for each presence of mid, out and bias."""
    for there in product((False, True), repeat=3):
        absent = frozenset(name for name, on in zip(("mid", "out", "bias"), there) if not on)
        trained = {"x", "mid", "out"} - absent | ({"a", "b"} if trained_a else set())
        yield frozenset(trained), absent


# -- against the definition ----------------------------------------------------------------------------


@each_choice
@pytest.mark.parametrize("trained_a", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_output_and_gradients(choice: Choice, trained_a: bool, transposed: bool) -> None:
    for trained, absent in presences(trained_a):
        for tokens in ((2, 3), (2, 20), (1, 1), (0,), (3, 0), ()):
            agrees(Case(tokens, 4, 5, 3, trained, absent, transposed), choice)
        agrees(Case((2, 20), 4, 5, 3, trained, absent, transposed, torch.float32), choice)


@each_choice
@pytest.mark.parametrize("rank", [1, 2, 9], ids=lambda r: f"rank{r}")
def test_ranks_and_sizes_in_any_order(choice: Choice, rank: int) -> None:
    """A rank above in, above out; in above out and below; one input, one output."""
    for (inn, out), trained_a in product(((4, 5), (7, 3), (1, 6), (6, 1), (1, 1)), (False, True)):
        trained = frozenset({"x", "mid", "out"} | ({"a", "b"} if trained_a else set()))
        for tokens in ((1,), (2, 30)):
            agrees(Case(tokens, inn, out, rank, trained, transposed=True), choice)


@each_choice
def test_each_set_of_what_is_trained(choice: Choice) -> None:
    """Also x that needs no gradient, nothing that needs one, and the bias."""
    for size in range(2 ** len(LEAVES)):
        trained = frozenset(name for i, name in enumerate(LEAVES) if size >> i & 1)
        agrees(Case((2, 6), trained=trained), choice)


@each_choice
@pytest.mark.parametrize("trained_a", [False, True], ids=["frozen", "trained"])
def test_derivatives_by_finite_differences(choice: Choice, trained_a: bool) -> None:
    for trained, absent in presences(trained_a):
        t = Case((1, 2), 2, 3, 2, trained, absent, transposed=trained_a).tensors()
        names = sorted(trained)

        def f(*values: Tensor, t: dict[str, Tensor | None] = t, names: list[str] = names) -> Tensor:
            return run({**t, **dict(zip(names, values))}, choice)

        values = [needed(t[name]) for name in names]
        assert gradcheck(f, values)
        if len(absent) in (0, 3):
            assert gradgradcheck(f, values)


@pytest.mark.full
@each_choice
@pytest.mark.parametrize("trained_a", [False, True], ids=["frozen", "trained"])
def test_second_derivatives_in_every_case(choice: Choice, trained_a: bool) -> None:
    for trained, absent in presences(trained_a):
        for tokens in ((1,), (2, 4)):
            t = Case(tokens, 2, 3, 2, trained, absent, transposed=not trained_a).tensors()
            names = sorted(trained)

            def f(*values: Tensor, t: dict[str, Tensor | None] = t, names: list[str] = names) -> Tensor:
                return run({**t, **dict(zip(names, values))}, choice)

            assert gradgradcheck(f, [needed(t[name]) for name in names])


def test_a_planted_fault_in_any_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Factors.gradients
    for place in range(3):

        def planted(self: Factors, statistic: Tensor, wanted: Any, place: int = place) -> Any:
            found = list(real(self, statistic, wanted))
            found[place] = None if found[place] is None else found[place] * 1.001
            return tuple(found)

        monkeypatch.setattr(Factors, "gradients", planted)
        for choice in CHOICES:
            with pytest.raises(AssertionError, match=("b: ", "mid: ", "out: ")[place]):
                agrees(Case(trained=frozenset(LEAVES)), choice)


# -- how x, the gradient and the function are given -----------------------------------------------------


def _strange() -> dict[str, Callable[[Tensor], Tensor]]:
    """Views of a (3, 6, 4) tensor, each (..., 4)."""
    return {
        "transposed": lambda x: x.transpose(0, 1),
        "strided": lambda x: x[:, ::2],
        "expanded": lambda x: x[:1].expand(5, 6, 4),
        "sliced": lambda x: torch.cat([x, x], -1)[..., 2:6],
        "columns": lambda x: x.flatten(0, 1).T.contiguous().T,
        "flipped": lambda x: x.flip(0)[:, 1:].transpose(0, 1),
    }


@each_choice
@pytest.mark.parametrize("view", _strange(), ids=str)
def test_inputs_that_are_not_contiguous(choice: Choice, view: str) -> None:
    for trained_a, few in product((False, True), (False, True)):
        rank = 40 if few else 3
        trained = frozenset({"x", "mid", "out"} | ({"a", "b"} if trained_a else set()))
        t = Case((3, 6), 4, 50 if few else 5, rank, trained).tensors()
        exact = wide(t)
        for source in (t, exact):
            source["leaf"] = source["x"]
            source["x"] = _strange()[view](needed(source["x"]))
        y, expected = run(t, choice), composed(exact)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        permuted = torch.randn(y.shape[::-1], dtype=torch.float64).permute(*range(y.ndim)[::-1])
        for g in (torch.ones((), dtype=torch.float64).expand(y.shape), permuted):  # the first is that of y.sum()
            leaves = ["leaf", *sorted(trained - {"x"})]
            found = torch.autograd.grad(y, [needed(t[n]) for n in leaves], g, retain_graph=True)
            right = torch.autograd.grad(expected, [needed(exact[n]) for n in leaves], g, retain_graph=True)
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


# -- one layer several times, and changes in between ----------------------------------------------------


def _both(trained_a: bool) -> frozenset[str]:
    return frozenset({"x", "mid", "out"} | ({"a", "b"} if trained_a else set()))


@each_choice
@pytest.mark.parametrize("trained_a", [False, True], ids=["frozen", "trained"])
def test_one_layer_twice_in_a_forward(choice: Choice, trained_a: bool) -> None:
    t = Case((2, 6), 4, 4, 3, _both(trained_a)).tensors()
    exact = wide(t)
    y = run({**t, "x": torch.tanh(run(t, choice))}, choice)
    expected = composed({**exact, "x": torch.tanh(composed(exact))})
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(gradients(y, t, g), gradients(expected, exact, g))


@each_choice
@pytest.mark.parametrize("trained_a", [False, True], ids=["frozen", "trained"])
def test_a_backward_can_run_twice(choice: Choice, trained_a: bool) -> None:
    t = Case(trained=_both(trained_a)).tensors()
    leaves = [needed(t[name]) for name in sorted(_both(trained_a))]
    y = run(t, choice)
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(one, two) for one, two in zip(first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), leaves)


@each_choice
def test_several_layers_may_be_given_one_z(choice: Choice) -> None:
    t, other = Case((2, 9)).tensors(), Case((2, 9)).tensors(seed=5)
    exact, exact_other = wide(t), wide(other)
    x, a = needed(t["x"]), needed(t["a"])
    z = x @ a.T
    y = run(t, choice, z) + run({**other, "x": x, "a": a}, FACTORED, z) * 2.0
    expected = composed(exact) + composed({**exact_other, "x": exact["x"], "a": exact["a"]}) * 2.0
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    torch.testing.assert_close(gradients(y, t, g), gradients(expected, exact, g))


def changed_between(choice: Choice, trained_a: bool, name: str) -> bool:
    """Change one tensor in place between forward and backward; whether autograd refused, else no number may move."""
    found: list[Any] = []
    for change in (False, True):
        t = Case((2, 6), trained=_both(trained_a)).tensors()
        leaves = [needed(t[n]) for n in sorted(_both(trained_a))]
        t["x"] = needed(t["x"]) * 1.0
        y = run(t, choice)
        if change:
            with torch.no_grad():
                needed(t[name]).mul_(3.0)
        try:
            found.append(torch.autograd.grad(y.square().sum(), leaves))
        except RuntimeError as error:
            if not change or "modified by an inplace operation" not in str(error):
                raise
            return True
    assert all(torch.equal(one, two) for one, two in zip(*found)), f"a changed {name} gave other gradients"
    return False


@each_choice
@pytest.mark.parametrize("trained_a", [False, True], ids=["frozen", "trained"])
def test_a_change_between_forward_and_backward_gives_no_wrong_number(choice: Choice, trained_a: bool) -> None:
    refused = {name for name in ("x", "w", "a", "b", "mid", "out") if changed_between(choice, trained_a, name)}
    assert refused >= {"w", "a", "b", "mid", "out"}  # all that the gradient of x depends on
    assert ("x" in refused) is (trained_a or choice.dense), "x is kept, and only where it is used"


def test_a_planted_unguarded_reference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept around autograd's back is changed with the tensor."""
    real = lowrank._Linear.backward

    def planted(ctx: Any, g: Tensor) -> Any:
        class Unguarded:
            saved_tensors = ctx.held
            needs_input_grad = ctx.needs_input_grad
            scale, choice, read, own_z = ctx.scale, ctx.choice, ctx.read, ctx.own_z

        return real(Unguarded, g)

    forward = lowrank._Linear.forward

    def kept(ctx: Any, *args: Any) -> Tensor:
        y = forward(ctx, *args)
        x, z, weight, _, a, b, mid, out = args[:8]
        ctx.held = (x, x @ a.T if z is None else z, weight, a, b, mid, out)
        ctx.save_for_backward()
        return y

    monkeypatch.setattr(lowrank._Linear, "forward", staticmethod(kept))
    monkeypatch.setattr(lowrank._Linear, "backward", staticmethod(planted))
    with pytest.raises(AssertionError, match="gave other gradients"):
        changed_between(DENSE, False, "mid")


# -- lift: the factored form on an output that another made ----------------------------------------------


def composed_lift(y: Tensor, z: Tensor, t: dict[str, Tensor | None], axis: int) -> Tensor:
    h = z.movedim(axis, -1)
    h = h if t["mid"] is None else h * t["mid"]
    h = torch.einsum("...k,ok->...o", h * 1.5, needed(t["b"]))
    h = h if t["out"] is None else h * t["out"]
    return y + h.movedim(-1, axis)


LIFTED = {
    "rows": ((2, 6), -1),
    "few": ((1,), -1),
    "none": ((0, 3), -1),
    "conv1d": ((2, 7), 1),
    "conv2d": ((2, 3, 4), 1),
    "conv3d": ((2, 3, 2, 2), 1),
    "no batch": ((0, 3, 4), 1),
    "no places": ((2, 0, 4), 1),
}


@pytest.mark.parametrize("case", LIFTED)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "permuted"])
def test_lift_equals_the_definition(case: str, last: bool) -> None:
    lead, axis = LIFTED[case]
    for (trained, absent), transposed in product(presences(True), (False, True)):
        t = Case((1,), 4, 5, 3, trained - {"x", "a"}, absent, transposed).tensors()

        def made(features: int) -> Tensor:
            if axis == -1:
                value = torch.randn(*lead, features, dtype=torch.float64)
                return value.transpose(0, -1).contiguous().transpose(0, -1) if last else value
            value = torch.randn(lead[0], features, *lead[1:], dtype=torch.float64)
            return value.movedim(1, -1).contiguous().movedim(-1, 1) if last else value

        y, z = made(5).requires_grad_(), made(3).requires_grad_()
        b = needed(t["b"])
        found = lift(y, z, Factors(b, t["mid"], t["out"], 1.5), axis)
        expected = composed_lift(y, z, t, axis)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        leaves = [y, z, *(v for v in (t["b"], t["mid"], t["out"]) if v is not None and v.requires_grad)]
        g = torch.randn_like(found)
        for one, two in zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, leaves, g)):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [-1, 1])
def test_derivatives_of_lift_by_finite_differences(axis: int) -> None:
    t = Case((1,), 2, 3, 2, frozenset({"b", "mid", "out"})).tensors()
    shape = (2, 2) if axis == -1 else (2,)
    y = torch.randn(*((*shape, 3) if axis == -1 else (2, 3, 2)), dtype=torch.float64, requires_grad=True)
    z = torch.randn(*((*shape, 2) if axis == -1 else (2, 2, 2)), dtype=torch.float64, requires_grad=True)

    def f(y: Tensor, z: Tensor, b: Tensor, mid: Tensor, out: Tensor) -> Tensor:
        return lift(y, z, Factors(b, mid, out, 1.5), axis)

    values = [y, z, *(needed(t[name]) for name in ("b", "mid", "out"))]
    assert gradcheck(f, values)
    assert gradgradcheck(f, values)


# -- what is kept until the backward ---------------------------------------------------------------------


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """What autograd keeps in this context."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def storages(tensors: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


def kept_beside(t: dict[str, Tensor | None], choice: Choice) -> tuple[list[tuple[int, ...]], bool]:
    """The shapes of the memory kept that is no part of the layer or its input, and whether the input is kept."""
    with keeping() as kept:
        y = run(t, choice)
    fresh = storages(kept) - storages(t.values())
    assert not storages(kept) & storages([y]), "the output is kept"
    shapes = {k.untyped_storage().data_ptr(): tuple(k.shape) for k in kept}
    return [shapes[place] for place in sorted(fresh)], bool(storages(kept) & storages([t["x"]]))


@each_choice
def test_what_is_kept(choice: Choice) -> None:
    """z alone; with dense gradients x alone; where a is trained, x, and z for the rest."""
    case = Case((2, 32), 8, 16, 4)
    frozen = replace(case, trained=frozenset({"x", "mid", "out"}))
    assert kept_beside(frozen.tensors(), choice) == ([] if choice.dense else [(2, 32, 4)], choice.dense)
    assert kept_beside(replace(frozen, transposed=True).tensors(), choice)[1] is choice.dense
    lora = replace(case, trained=frozenset({"x", "a", "b"}), absent=frozenset({"mid", "out"}))
    assert kept_beside(lora.tensors(), choice) == ([] if choice.dense else [(2, 32, 4)], True)
    only_a = replace(lora, trained=frozenset({"a"}))
    assert kept_beside(only_a.tensors(), choice) == ([], True)
    only_x = replace(lora, trained=frozenset({"x"}))
    assert kept_beside(only_x.tensors(), choice) == ([], False)
    nothing = replace(lora, trained=frozenset())
    assert kept_beside(nothing.tensors(), choice) == ([], False)
    with torch.no_grad():
        assert kept_beside(frozen.tensors(), choice) == ([], False)


def test_a_planted_kept_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    t = Case((2, 32), 8, 16, 4).tensors()
    monkeypatch.setattr(lowrank, "linear", None)
    with keeping() as kept:
        composed(t)
    assert any(k.shape[-1] == 16 and k.numel() == 2 * 32 * 16 for k in kept)  # so the composed form is seen to keep it
    forward = lowrank._Linear.forward

    def planted(ctx: Any, *args: Any) -> Tensor:
        y = forward(ctx, *args)
        ctx.save_for_backward(y)
        return y

    monkeypatch.setattr(lowrank._Linear, "forward", staticmethod(planted))
    with pytest.raises(AssertionError, match="the output is kept"):
        kept_beside(t, FACTORED)


def test_lift_keeps_z_alone() -> None:
    y, z = torch.randn(2, 32, 16), torch.randn(2, 32, 4, requires_grad=True)
    b, d, v = torch.randn(16, 4), torch.randn(4, requires_grad=True), torch.randn(16, requires_grad=True)
    for axis in (-1, 1):
        source = (y, z) if axis == -1 else (y.movedim(-1, 1).contiguous(), z.movedim(-1, 1))
        with keeping() as kept:
            lift(*source, Factors(b, d, v, 2.0), axis)
        assert storages(kept) == storages([z, b, d, v])


def test_float32_vectors_in_float64_products_are_widened_before_they_are_scaled() -> None:
    """The forms with few rows and with many then agree to float64's rounding."""
    vector, scale = torch.rand(5) + 0.1, 1.0 / 3.0
    found = lowrank.scale_features(torch.ones(5, dtype=torch.float64), vector, scale)
    torch.testing.assert_close(found, vector.double() * scale, rtol=1e-15, atol=0.0)
    t = Case((2, 20), trained=frozenset()).tensors()
    t["mid"], t["out"] = needed(t["mid"]).float(), needed(t["out"]).float()
    many = run(t, FACTORED, scale=scale)
    few = torch.stack([run({**t, "x": row}, FACTORED, scale=scale) for row in needed(t["x"]).flatten(0, 1)])
    torch.testing.assert_close(few.view_as(many), many, rtol=1e-12, atol=1e-12)


# -- 16 bits ----------------------------------------------------------------------------------------------

NARROW = pytest.mark.parametrize("dtype", lowrank.NARROW, ids=str)


def errors(case: Case, f: Callable[[dict[str, Tensor | None]], Tensor]) -> Counter[str]:
    """The summed relative errors of output and gradients against float64, over seeds."""
    total: Counter[str] = Counter()
    for seed in range(4):
        t = case.tensors(seed)
        exact = wide(t)
        y, expected = f(t), composed(exact)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(case.dtype)
        found = {"y": y.detach(), **gradients(y, t, g)}
        right = {"y": expected.detach(), **gradients(expected, exact, g.double())}
        for name, value in right.items():
            total[name] += float((found[name].double() - value).norm() / value.norm())
    return total


@NARROW
@pytest.mark.parametrize("few", [False, True], ids=["many", "few"])
def test_narrow_errors_are_no_worse_than_those_of_autograd(dtype: torch.dtype, few: bool) -> None:
    """The factored form against the composed one in the same dtype, with the same float32 vectors."""
    for trained_a in (False, True):
        tokens = (2, 8) if few else (2, 200)
        absent = frozenset({"mid", "out"} if trained_a else set())
        trained = frozenset({"x", "a", "b"} if trained_a else {"x", "mid", "out"})
        case = Case(tokens, 48, 64, 32, trained, absent | {"bias"}, not trained_a, dtype, 0.3)
        ours, theirs = errors(case, lambda t: run(t, FACTORED)), errors(case, composed)
        for name in theirs:
            assert ours[name] <= 1.02 * theirs[name], f"{name}: {ours[name]:.2e}, composed {theirs[name]:.2e}"


def statistic_error(dtype: torch.dtype, size: float) -> float:
    """The error of the float32 vectors' gradients where z and g are exact in ``dtype``, over many tokens."""
    generator = torch.Generator().manual_seed(0)
    x = (size * torch.randn(4096, 8, generator=generator)).abs().to(dtype)
    g = (size * torch.randn(4096, 6, generator=generator)).abs().to(dtype)
    a, b, w = torch.eye(8).to(dtype), torch.ones(6, 8).to(dtype), torch.zeros(6, 8).to(dtype)
    mid, out = torch.ones(8, requires_grad=True), torch.ones(6, requires_grad=True)
    found = torch.autograd.grad(linear(x, w, None, a, Factors(b, mid, out, 1.0), FACTORED), [mid, out], g)
    statistic = g.double().T @ x.double()  # (6, 8)
    right = (statistic.sum(0), statistic.sum(1))
    return max(float(((f - r) / r).abs().max()) for f, r in zip(found, right))


@NARROW
def test_sums_over_tokens_are_made_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statistic_error(dtype, 8.0) < 1e-5  # in float16, M itself overflows
    monkeypatch.setattr(lowrank, "_statistic", lambda g, z, b: g.T @ z)
    assert not statistic_error(dtype, 8.0) < 1e-4, "a planted sum in 16 bits was not seen"


@NARROW
def test_what_rounding_takes_of_a_change_is_measured(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 50, generator=generator).to(dtype)
    a, b = torch.randn(4, 50, generator=generator).to(dtype), torch.randn(40, 4, generator=generator).to(dtype)
    previous = 2.0
    for size in (1e-5, 1e-3, 1e-2, 1.0):
        out = torch.full((40,), size)
        change = (b.double() * size) @ a.double()
        stored = (w.double() + change).float().to(dtype).double()
        right = float((stored - w.double() - change).norm() / change.norm())
        found = swallowed(w, a, Factors(b, None, out, 1.0))
        assert found == pytest.approx(right, rel=0.01)
        assert found < previous
        previous = found
    assert previous < 0.01
    assert swallowed(w, a, Factors(b, None, torch.zeros(40), 1.0)) == 1.0


class Products(TorchDispatchMode):
    """The matrix products that run: (dtype of the operands, their shapes)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm):
            self.seen.append((args[-1].dtype, tuple(tuple(arg.shape) for arg in args[-2:])))
        assert func.overloadpacket is not torch.ops.aten._local_scalar_dense, "the host waits for the device"
        return func(*args, **(kwargs or {}))


@NARROW
def test_no_float32_product_over_tokens_runs(dtype: torch.dtype) -> None:
    """But for M, whose sum is in float32; on a CPU its operands are widened first."""
    for trained_a in (False, True):
        t = Case((2, 50), 8, 12, 4, _both(trained_a), dtype=dtype, transposed=True).tensors()
        with Products() as products:
            run(t, FACTORED).sum().backward()
        wide_ones = [shapes for seen, shapes in products.seen if seen == torch.float32 and 100 in shapes[0]]
        assert wide_ones, "M is not there"
        assert all(shapes[0][1] == 100 == shapes[1][0] for shapes in wide_ones)  # over tokens, never (tokens, .)
        assert len(products.seen) - len(wide_ones) == 6


# -- autocast, and nothing that waits -----------------------------------------------------------------


def test_under_autocast_lift_is_what_it_is_in_16_bits() -> None:
    narrow = torch.bfloat16
    y, z = torch.randn(2, 40, 12).to(narrow), torch.randn(2, 40, 6).to(narrow).requires_grad_()
    b, d = torch.randn(12, 6), torch.randn(6, requires_grad=True)
    v, g = torch.randn(12, requires_grad=True), torch.randn(2, 40, 12).to(narrow)
    plain = lift(y, z, Factors(b, d, v, 2.0))
    expected = torch.autograd.grad(plain, [z, d, v], g)
    with torch.autocast("cpu", torch.bfloat16):
        inside = lift(y, z, Factors(b, d, v, 2.0))
        backward_inside = torch.autograd.grad(inside, [z, d, v], g, retain_graph=True)
    outside = torch.autograd.grad(inside, [z, d, v], g)
    assert torch.equal(inside, plain)
    for found in (backward_inside, outside):
        assert all(torch.equal(one, two) for one, two in zip(found, expected))


@each_choice
def test_autocast_changes_nothing_where_all_has_the_dtype_it_should(choice: Choice) -> None:
    t = Case((2, 40), 8, 12, 6, _both(True), dtype=torch.float32).tensors()
    g = torch.randn(2, 40, 12)
    expected = run(t, choice)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(t, choice)
        found = gradients(y, t, g)
    assert torch.equal(y, expected)
    for name, value in gradients(expected, t, g).items():
        assert torch.equal(found[name], value)


@each_choice
def test_nothing_waits_for_the_device(choice: Choice) -> None:
    for trained_a in (False, True):
        t = Case((2, 50), trained=_both(trained_a)).tensors()
        with Products() as products:
            run(t, choice).sum().backward()
        assert products.seen
    with pytest.raises(AssertionError, match="waits"), Products():
        swallowed(torch.ones(2, 2), torch.ones(1, 2), Factors(torch.ones(2, 1), None, None, 1.0))


# -- transforms -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
@each_choice
def test_transforms_and_forward_mode(choice: Choice) -> None:
    t = Case((3, 6), trained=frozenset()).tensors()
    exact = wide(t)
    names = ("x", "a", "b", "mid", "out")
    values = tuple(needed(t[name]) for name in names)
    tangents = tuple(torch.randn_like(value) for value in values)

    def of(source: dict[str, Tensor | None], f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: f({**source, **dict(zip(names, given))})

    ours, theirs = of(t, lambda s: run(s, choice)), of(exact, composed)
    torch.testing.assert_close(torch.func.jvp(ours, values, tangents), torch.func.jvp(theirs, values, tangents))
    every = tuple(range(5))
    one, two = (torch.func.grad(lambda *v, f=f: f(*v).square().sum(), every)(*values) for f in (ours, theirs))
    torch.testing.assert_close(one, two)
    lanes = (0, None, None, None, None)
    torch.testing.assert_close(torch.func.vmap(ours, lanes)(*values), theirs(*values))
    with torch.autograd.forward_ad.dual_level():
        dual = tuple(torch.autograd.forward_ad.make_dual(v, d) for v, d in zip(values, tangents))
        found = torch.autograd.forward_ad.unpack_dual(ours(*dual))
    torch.testing.assert_close((found.primal, found.tangent), torch.func.jvp(theirs, values, tangents))


@each_choice
def test_batched_gradients(choice: Choice) -> None:
    for trained_a in (False, True):
        t = Case((2, 2), trained=_both(trained_a)).tensors()
        leaves = [needed(t[name]) for name in sorted(_both(trained_a))]
        y = run(t, choice)
        every = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
        batched = torch.autograd.grad(y, leaves, every, is_grads_batched=True, retain_graph=True)
        for row, g in enumerate(every):
            single = torch.autograd.grad(y, leaves, g, retain_graph=True)
            for many, one in zip(batched, single):
                torch.testing.assert_close(many[row], one)


@each_choice
def test_inference_mode(choice: Choice) -> None:
    t = Case((2, 6), trained=_both(True)).tensors()
    with torch.inference_mode():
        y = run(t, choice)
    torch.testing.assert_close(y.clone(), composed(wide(t)).detach())
    assert not y.requires_grad


@each_choice
def test_a_weight_that_has_to_be_read_is_read_once_each_way(choice: Choice) -> None:
    for needs_x in (False, True):
        t = Case((2, 6), trained=_both(False) - (frozenset() if needs_x else {"x"})).tensors()
        w, reads = needed(t["w"]), 0

        def read(w: Tensor = w) -> Tensor:
            nonlocal reads
            reads += 1
            return w.clone()

        factors = Factors(needed(t["b"]), t["mid"], t["out"], 1.5)
        y = linear(needed(t["x"]), read, t["bias"], needed(t["a"]), factors, choice)
        assert reads == 1
        found = gradients(y, t, torch.ones_like(y))
        assert reads == 1 + needs_x
        exact = wide(t)
        torch.testing.assert_close(found, gradients(composed(exact), exact, torch.ones_like(y)))
