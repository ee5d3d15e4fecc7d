"""The functions under a mixed batch: each row through the vectors or factors of its own adapter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kilotune.kernels import banked
from kilotune.kernels.banked import Owners, lift_own, lift_shared

COUNT, RANK, INN, OUT = 3, 2, 5, 4
# Which adapter each row belongs to, and what then happens: rows of each together, padded, or with copied factors.
INDICES = {
    "one each": [0, 1, 2],
    "two each, in order": [0, 0, 1, 1, 2, 2],
    "two each, mixed": [2, 0, 1, 0, 2, 1],
    "few and many": [1, 1, 1, 0, 1, 2],
    "one has none": [2, 0, 2],
}


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("tokens", [(), (1,), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("common", ["", "a", "b"])
@pytest.mark.parametrize("vectors", [False, True])
def test_factors_of_ones_own(index: list[int], tokens: tuple[int, ...], common: str, vectors: bool) -> None:
    x = random(len(index), *tokens, INN, grad=True)
    a = random(*(() if common == "a" else (COUNT,)), RANK, INN, grad=True)
    b = random(*(() if common == "b" else (COUNT,)), OUT, RANK, grad=True)
    mid, out = (random(COUNT, n, grad=True) if vectors else None for n in (RANK, OUT))
    rows = []
    for row, i in zip(x, index, strict=True):
        h = row @ (a if common == "a" else a[i]).T
        h = 0.5 * (h if mid is None else h * mid[i]) @ (b if common == "b" else b[i]).T
        rows.append(h if out is None else h * out[i])
    owners = Owners.of(torch.tensor(index), COUNT)
    same(torch.stack(rows), lift_own(x, a, b, mid, out, 0.5, owners), [x, a, b, mid, out])
    blind = Owners(torch.tensor(index), COUNT, None)  # as on a device where looking at the index means to wait
    same(torch.stack(rows), lift_own(x, a, b, mid, out, 0.5, blind), [x, a, b, mid, out])


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize(("tokens", "axis"), [((), -1), ((7,), -1), ((2, 3), -1), ((7,), 1), ((2, 3), 1)], ids=str)
@pytest.mark.parametrize("without", ["", "mid", "out"])
@pytest.mark.parametrize("keeps", [False, True])
def test_factors_of_all(
    index: list[int],
    tokens: tuple[int, ...],
    axis: int,
    without: str,
    keeps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(banked, "_keeps", lambda v, b: keeps)

    def shaped(features: int) -> Tensor:
        return random(len(index), *((*tokens, features) if axis == -1 else (features, *tokens)), grad=True)

    y, z, b = shaped(OUT), shaped(RANK), random(OUT, RANK)
    mid = None if without == "mid" else random(COUNT, RANK, grad=True)
    out = None if without == "out" else random(COUNT, OUT, grad=True)
    rows = []
    for own, low, i in zip(y, z, index, strict=True):
        h = low if axis == -1 else low.movedim(0, -1)
        h = 0.5 * (h if mid is None else h * mid[i]) @ b.T
        h = h if out is None else h * out[i]
        rows.append(own + (h if axis == -1 else h.movedim(-1, 0)))
    for owners in (Owners.of(torch.tensor(index), COUNT), Owners(torch.tensor(index), COUNT, None)):
        same(torch.stack(rows), lift_shared(y, z, b, mid, out, 0.5, owners, axis), [y, z, mid, out])
    before = y.detach().clone()
    with torch.no_grad():
        plain = lift_shared(y, z, b, mid, out, 0.5, Owners.of(torch.tensor(index), COUNT), axis)
    assert torch.allclose(plain, torch.stack(rows), rtol=0, atol=1e-12)
    assert torch.equal(y, before), "the base's output was written into"


@pytest.mark.parametrize("keeps", [False, True])
def test_a_second_derivative(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(banked, "_keeps", lambda v, b: keeps)
    owners = Owners.of(torch.tensor([0, 2, 2, 1]), COUNT)
    y, z, b = random(4, 3, OUT, grad=True), random(4, 3, RANK, grad=True), random(OUT, RANK)
    mid, out = random(COUNT, RANK, grad=True), random(COUNT, OUT, grad=True)

    def run(y: Tensor, z: Tensor, mid: Tensor, out: Tensor) -> Tensor:
        return lift_shared(y, z, b, mid, out, 0.5, owners)

    assert torch.autograd.gradgradcheck(run, (y, z, mid, out))


def test_the_change_is_kept_where_that_is_cheaper() -> None:
    def sizes(rank: int, out: int) -> list[int]:
        kept: list[int] = []

        def pack(t: Tensor) -> Tensor:
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, z = torch.zeros(2, 3, out), torch.zeros(2, 3, rank, requires_grad=True)
            vectors = torch.ones(2, out, requires_grad=True)
            lift_shared(y, z, torch.ones(out, rank), None, vectors, 1.0, Owners.of(torch.arange(2), 2))
        return kept

    assert 2 * 3 * 8 in sizes(rank=2, out=8)
    assert 2 * 3 * 9 not in sizes(rank=2, out=9)


def same(expected: Tensor, found: Tensor, leaves: list[Tensor | None]) -> None:
    """Values and gradients."""
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    wanted = [leaf for leaf in leaves if leaf is not None]
    g = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(expected, wanted, g, retain_graph=True, materialize_grads=True),
        torch.autograd.grad(found, wanted, g, materialize_grads=True),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_how_rows_stand() -> None:
    index = torch.arange(3).repeat_interleave(2)
    assert Owners.of(index, 3).even == 2
    assert Owners.of(index, 3).spread(4, torch.device("cpu")).even == 8
    assert Owners.of(index.flip(0), 3).even is None
    assert Owners.of(torch.tensor([0, 2]), 3).even is None
    rows, back, each = Owners.of(torch.tensor([1, 1, 0, 1]), 3).padded()
    assert each == 3
    assert rows.view(3, 3).tolist() == [[2, 0, 0], [0, 1, 3], [0, 0, 0]]
    assert back.tolist() == [3, 4, 0, 5]
