"""The cost model: its counts are those of the products that run, and its pick is the cheapest."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kilotune.errors import ConfigError
from kilotune.kernels import lowrank, ways
from kilotune.kernels.lowrank import Factors, linear
from kilotune.kernels.ways import PASS, WAYS, Choice, Shape, Way, costs, multiply_adds, pick

CHOICES = [Choice(*forms) for forms in product((False, True), repeat=3)]
SHAPES = [(40, 8, 12, 3), (6, 20, 4, 9), (300, 5, 7, 30), (2, 16, 16, 12)]  # tokens, in, out, rank; the last few rows


def _in_place(_: Any, one: Any, two: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The FLOPs of addmm_, which torch's counter does not know."""
    return int(2 * one[0] * one[1] * two[1])


def counted(shape: Shape, choice: Choice) -> int:
    """The multiply-adds of a step, as torch counts them, without the frozen layer's own."""
    t, i, o, r = shape[:4]
    x = torch.randn(t, i, requires_grad=shape.input)
    a = torch.randn(r, i, requires_grad=shape.vectors and shape.trained_a)
    b = torch.randn(o, r, requires_grad=shape.vectors and shape.trained_a)
    mid, out = (torch.randn(n, requires_grad=shape.vectors and not shape.trained_a) for n in (r, o))
    w, factors = torch.randn(o, i), Factors(b, mid, out, 1.0)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        z = x @ a.T if shape.sharers > 1 and lowrank.needs_z(choice, factors) else None
        ys = [linear(x, w, None, a, factors, choice, z) for _ in range(shape.sharers)]
        total = torch.stack([y.sum() for y in ys]).sum()
        if total.requires_grad:
            total.backward()  # type: ignore[no-untyped-call]
    frozen = t * i * o * (2 if shape.input else 1) * len(ys)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2 - frozen


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "".join("FM"[on] for on in c))
def test_counts_are_those_of_what_runs(choice: Choice) -> None:
    for sizes in SHAPES:
        for vectors, wanted, trained_a in product((True, False), (True, False), (False, True)):
            if choice.dense and not vectors:
                continue  # there is no gradient to form
            shape = Shape(*sizes, vectors=vectors, input=wanted, trained_a=trained_a)
            assert counted(shape, choice) == multiply_adds(shape, choice), shape


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "".join("FM"[on] for on in c))
def test_what_layers_share_counts_once(choice: Choice) -> None:
    for sizes, wanted, n in product(SHAPES, (True, False), (2, 3)):
        shape = Shape(*sizes, sharers=n, mean_out=float(sizes[2]), input=wanted)
        shared = wanted and not choice.merged_input and not ways._needs_z(shape, choice)
        total = n * multiply_adds(shape, choice)
        if shared:  # without a z there is nothing to share
            total += (n - 1) * shape.tokens * shape.inn * shape.rank
        assert counted(shape, choice) == pytest.approx(total, abs=1e-6), shape


def test_a_planted_product_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lowrank._product

    def planted(x: Tensor, w: Any, bias: Any, a: Tensor, *rest: Any) -> Tensor:
        x @ a.T
        return real(x, w, bias, a, *rest)

    monkeypatch.setattr(lowrank, "_product", planted)
    for choice in CHOICES:
        shape = Shape(40, 8, 12, 3)
        assert counted(shape, choice) == multiply_adds(shape, choice) + 40 * 8 * 3


# -- the pick -------------------------------------------------------------------------------------------


def test_the_pick_is_the_cheapest_that_can_run() -> None:
    """Against all eight forms, on a grid; what cannot differ is not picked."""
    seen = set()
    for t, (i, o), r, n in product(
        (0, 1, 100, 1000, 10_000, 10**6), ((64, 64), (4096, 512), (300, 9000)), (1, 64, 1024), (1, 3)
    ):
        for vectors, wanted, trained_a in product((True, False), repeat=3):
            shape = Shape(t, i, o, r, n, float(o), vectors, wanted, trained_a)
            found = pick(shape)
            able = [c for c in CHOICES if (vectors or not c.dense) and (wanted or c.merged_input == c.merged_forward)]
            assert found in able
            assert costs(shape, found) == min(costs(shape, c) for c in able)
            seen.add(found)
    assert {WAYS[way] for way in (Way.FACTORED, Way.MERGED, Way.DENSE)} <= seen


def test_equal_costs_go_to_what_keeps_less() -> None:
    """Without tokens all is free but W', and nothing is built."""
    assert pick(Shape(0, 8, 8, 4)) == WAYS[Way.FACTORED]


def test_the_conditions_of_the_three_ways_follow_from_the_counts() -> None:
    """Merged wins above T = 2 in out / (in + 2 out), dense where r (in + out - in out / T) is above in out."""
    for t, i, o, r in product((1, 7, 64, 500, 4096), (8, 100, 768), (8, 120, 2048), (1, 16, 256, 1024)):
        factored, merged, dense = (
            multiply_adds(Shape(t, i, o, r), WAYS[way]) for way in (Way.FACTORED, Way.MERGED, Way.DENSE)
        )
        assert (merged < factored) == (t * (i + 2 * o) > 2 * i * o)
        assert (dense < merged) == (r * ((i + o) * t - i * o) > i * o * t)


def test_passes_are_those_of_the_larger_tensors() -> None:
    """What is written beside the products: W' twice, or the change of the output and of the gradient."""
    shape = Shape(100, 30, 50, 7)
    for way, numbers in ((Way.FACTORED, 100 * 50 + 100 * 30), (Way.MERGED, 2 * 30 * 50), (Way.DENSE, 2 * 30 * 50)):
        assert costs(shape, WAYS[way]) - multiply_adds(shape, WAYS[way]) == PASS * numbers
    inference = shape._replace(vectors=False, input=False)
    assert costs(inference, WAYS[Way.MERGED]) == 7 * 30 * 50 + PASS * 30 * 50


def test_layers_that_share_a_z_decide_alike_on_their_gradients() -> None:
    """Whether the vectors' gradients come from z or from x follows from the mean of what they put out."""
    for t, r in product((64, 1024, 16_384), (16, 256, 2048)):
        small, large = (pick(Shape(t, 512, out, r, 3, (512 + 128 + 128) / 3)) for out in (128, 512))
        assert small.dense == large.dense


# -- names ---------------------------------------------------------------------------------------------


def test_ways_by_name() -> None:
    assert [Way.of(way) for way in ("picked", "factored", "merged", "dense")] == list(Way)
    assert Way.of(Way.DENSE) is Way.DENSE
    with pytest.raises(ConfigError, match=r"way: expected one of \['picked', .*got 'mergd'.*merged"):
        Way.of("mergd")
    for value in (None, 3, ["merged"], ""):
        with pytest.raises(ConfigError, match="way: expected one of"):
            Way.of(value)
