"""The Walsh-Hadamard transform and the projection operators, against dense matrices built from their definition."""

from __future__ import annotations

import copy
import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kilotune.kernels import projected
from kilotune.kernels.hadamard import hadamard, hadamard_matrix
from kilotune.kernels.projected import Held, Projection, kept_bytes, padded
from tests.conformance.one_vector import dense_matrix, fastfood_matrix, hadamard_by_bits

CPU = torch.device("cpu")
SHAPES = [(30, 8), (7, 5), (64, 16), (3, 20), (5, 1), (1, 1), (130, 33)]  # (rows, size)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- the transform ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2**k for k in range(12)])
def test_the_transform_is_the_matrix(size: int) -> None:
    dense = torch.from_numpy(hadamard_by_bits(min(size, 64))).to(torch.float64)
    assert torch.equal(hadamard_matrix(min(size, 64), dtype=torch.float64), dense)
    x = random(2, 3, size)
    whole = dense
    while whole.shape[0] < size:  # the definition in blocks, from the one built bit by bit
        whole = torch.cat([torch.cat([whole, whole], 1), torch.cat([whole, -whole], 1)])
    torch.testing.assert_close(hadamard(x), x @ whole.T, rtol=1e-12, atol=1e-12 * size)
    torch.testing.assert_close(hadamard(hadamard(x)), size * x, rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("shape", [(16,), (0, 16), (5, 1, 16)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    assert hadamard(x).shape == shape
    torch.testing.assert_close(hadamard(x), x @ hadamard_matrix(16, dtype=torch.float64))
    strided = random(3, 16, 4).transpose(1, 2)
    torch.testing.assert_close(hadamard(strided), strided @ hadamard_matrix(16, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_gradient_is_the_same_transform_not_normalised(size: int) -> None:
    """What is widely copied divides by sqrt(size) in the backward only; finite differences tell."""
    x = random(2, size).requires_grad_()
    assert torch.autograd.gradcheck(hadamard, (x,))
    assert torch.autograd.gradgradcheck(hadamard, (x,))
    g = random(2, size, seed=1)
    (got,) = torch.autograd.grad((hadamard(x) * g).sum(), x)
    torch.testing.assert_close(got, torch.from_numpy(g.numpy() @ hadamard_by_bits(size)))


def test_nothing_large_is_kept_for_the_backward() -> None:
    kept: list[int] = []
    x = torch.randn(50, 1024, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        hadamard(x)
    assert 0 < sum(kept) <= 2 * 4 * 32 * 32  # the two factors, and not x


def test_no_power_of_two_is_refused() -> None:
    for size in (0, 3, 12):
        with pytest.raises(ValueError, match=f"a power of two of rows, got {size}"):
            hadamard(torch.zeros(2, size))
        with pytest.raises(ValueError, match=f"got {size}"):
            hadamard_matrix(size)


def test_the_transform_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(hadamard, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), hadamard(x))


def test_made_in_inference_mode_it_can_be_trained_through() -> None:
    projected_size = 16
    with torch.inference_mode():
        hadamard(torch.zeros(projected_size, dtype=torch.float16))
        Projection(4, 0, 20, 9).forward(torch.zeros(9))
    x = torch.zeros(projected_size, dtype=torch.float16, requires_grad=True)
    hadamard(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [16.0, *[0.0] * 15]  # H applied to ones
    v, p = torch.zeros(9, requires_grad=True), Projection(4, 0, 20, 9)
    p.forward(v).sum().backward()
    torch.testing.assert_close(v.grad, by_hand(p).sum(0).float())


# -- the projections --------------------------------------------------------------------------------


def by_hand(p: Projection) -> Tensor:
    made = dense_matrix if p.dense else fastfood_matrix
    return torch.from_numpy(made(p.seed, p.site, p.rows, p.size))


def cases() -> list[Projection]:
    return [Projection(2**64 - 1 - i, i, *shape, dense) for i, shape in enumerate(SHAPES) for dense in (False, True)]


@pytest.mark.parametrize("p", cases(), ids=str)
def test_unit_vectors_give_the_matrix_of_the_definition(p: Projection) -> None:
    columns = [p.forward(unit) for unit in torch.eye(p.size, dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns, 1), by_hand(p), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("p", cases(), ids=str)
def test_gradients_are_those_of_finite_differences(p: Projection) -> None:
    v, g = random(p.size).requires_grad_(), random(p.rows, seed=1)
    assert torch.autograd.gradcheck(p.forward, (v,))
    assert torch.autograd.gradgradcheck(lambda v: p.forward(v * v), (v,))
    (got,) = torch.autograd.grad(p.forward(v) @ g, v)
    torch.testing.assert_close(got, by_hand(p).T @ g, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("at_once", [1, 16, 40])
def test_parts_at_once_change_nothing(dense: bool, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, v, g = Projection(5, 1, 75, 8, dense), random(8).requires_grad_(), random(75, seed=1)
    monkeypatch.setattr(projected, "AT_ONCE", at_once)
    monkeypatch.setattr(projected, "_kept", {})
    y = p.forward(v)
    torch.testing.assert_close(y, by_hand(p) @ v, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(y @ g, v)[0], by_hand(p).T @ g, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dense", [False, True])
def test_autograd_keeps_no_tensor(dense: bool) -> None:
    kept: list[int] = []
    v = torch.randn(9, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        Projection(1, 0, 1000, 9, dense).forward(v)
    assert sum(kept) <= 9


@pytest.mark.parametrize("dense", [False, True])
def test_dtypes_and_autocast(dense: bool) -> None:
    """16-bit vectors are widened, and autocast does not narrow: a projection's sums are over hundreds of numbers."""
    p, v = Projection(1, 0, 90, 40, dense), random(40)
    exact = by_hand(p) @ v
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        y = p.forward(v.to(dtype))
        assert y.dtype == wide
        reference = by_hand(p) @ v.to(dtype).double()
        torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
    narrow = v.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = p.forward(narrow)
        y.sum().backward()
    assert torch.equal(y, p.forward(v.float()))
    torch.testing.assert_close(narrow.grad, by_hand(p).sum(0).float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dense", [False, True])
def test_on_meta_nothing_is_drawn(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projected, "streams", None)
    p = Projection(0, 0, 10**12, 10**6, dense)
    assert p.forward(torch.empty(10**6, device="meta")).shape == (10**12,)
    assert p.nbytes() == (4 * 10**18 if dense else 9 * p.blocks * padded(10**6))


@pytest.mark.parametrize("dense", [False, True])
def test_the_operator_passes_torchs_own_checks(dense: bool) -> None:
    p = Projection(2**63 + 1, 2, 20, 6, dense)
    v = random(6).requires_grad_()
    arguments = (v, p.seed - 2**64, p.site, p.rows, dense)
    torch.library.opcheck(torch.ops.kilotune.project.default, arguments)
    back = (random(20).requires_grad_(), p.seed - 2**64, p.site, p.size, dense)
    torch.library.opcheck(torch.ops.kilotune.project_back.default, back)


# -- what is kept -----------------------------------------------------------------------------------


def test_the_bound_on_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is drawn anew, with the same result; what is kept is as large as stated."""
    monkeypatch.setattr(projected, "_kept", {})
    first, second = Projection(0, 0, 100, 30), Projection(0, 1, 100, 30)
    assert first.nbytes() == 128 * 7
    monkeypatch.setattr(projected, "KEEP_BYTES", first.nbytes() + second.nbytes() - 1)
    v = random(30)
    drawn: list[Any] = []
    draw = projected._draw_fastfood
    monkeypatch.setattr(projected, "_draw_fastfood", lambda p: drawn.append(p) or draw(p))
    y = [p.forward(v) for p in (first, second, first, second)]
    assert drawn == [first, second, second]
    assert kept_bytes(CPU) == kept_bytes() == first.nbytes()
    assert torch.equal(y[0], y[2])
    assert torch.equal(y[1], y[3])


def test_streams_are_freed_with_their_last_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projected, "_kept", {})
    p = Projection(987654321, 0, 64, 8)
    one, two = Held([p]), Held([p])
    assert copy.deepcopy(one) is one
    p.forward(random(8))
    held = kept_bytes()
    del one
    gc.collect()
    assert kept_bytes() == held
    del two
    gc.collect()
    assert kept_bytes() == held - p.nbytes()
    assert not any(key[0] == p for key in projected._kept)


# -- statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [False, True])
def test_the_projection_keeps_lengths_on_average(dense: bool) -> None:
    """With the gain of the whole, E |P v|^2 = |v|^2, and columns of two entries are nearly at right angles."""
    rows, size, ratios, angles = 512, 24, [], []
    gain = (3 / rows) ** 0.5 if dense else (rows * padded(size)) ** -0.5
    for seed in range(200):
        p = Projection(seed, 0, rows, size, dense)
        matrix = gain * torch.stack([p.forward(unit) for unit in torch.eye(size)[:2]], 1).double()
        v = random(2, seed=seed)
        ratios.append(float((matrix @ v).square().sum() / v.square().sum()))
        angles.append(float(matrix[:, 0] @ matrix[:, 1]))
    spread = np.std(ratios) / len(ratios) ** 0.5
    assert abs(np.mean(ratios) - 1) < 5 * spread < 0.05
    assert abs(np.mean(angles)) < 5 * np.std(angles) / len(angles) ** 0.5 + 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("p", cases(), ids=str)
def test_on_a_gpu_it_is_the_same_projection(p: Projection) -> None:
    v, g = random(p.size).cuda().requires_grad_(), random(p.rows, seed=1).cuda()
    y = p.forward(v)
    torch.testing.assert_close(y.cpu(), by_hand(p) @ v.detach().cpu(), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(y @ g, v)[0].cpu(), by_hand(p).T @ g.cpu(), rtol=1e-12, atol=1e-11)
