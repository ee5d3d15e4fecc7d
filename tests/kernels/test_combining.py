"""Tensors made into one: numpy in float64 beside it, place by place, as the papers have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kilotune import ConfigError
from kilotune.kernels.combining import combined, factors

WEIGHTS = (0.8, -0.5, 0.3)


def tensors() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in WEIGHTS]


def kept(values: Any, density: float) -> Any:
    """The largest numbers of a matrix, zeros elsewhere."""
    count = int(density * values.size)
    least = np.sort(np.abs(values).ravel())[values.size - count]
    return np.where(np.abs(values) >= least, values, 0.0)


def reference(way: str, density: float, sign: str) -> Any:
    """Place by place."""
    given = [one.numpy() for one in tensors()]
    given = given if way == "linear" else [kept(one, density) for one in given]
    found = np.zeros((4, 5))
    for place in np.ndindex(4, 5):
        values = [one[place] for one in given]
        if way != "ties":
            found[place] = sum(w * v for w, v in zip(WEIGHTS, values, strict=True))
            continue
        votes = sum(values) if sign == "total" else sum(np.sign(values))
        elected = 1.0 if votes >= 0 else -1.0
        own = [w * v for w, v in zip(WEIGHTS, values, strict=True) if np.sign(v) == elected]
        found[place] = sum(own) / max(len(own), 1)
    return found


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.35, 0.8])
@pytest.mark.parametrize("way", ["linear", "magnitude_prune", "ties"])
def test_what_comes_of_each_place(way: str, density: float, sign: str) -> None:
    found = combined(way, tensors(), WEIGHTS, density, sign)
    np.testing.assert_allclose(found.numpy(), reference(way, density, sign), atol=1e-12)


def test_random_numbers_are_dropped_and_the_mean_stays() -> None:
    ones = [torch.ones(400, 500, dtype=torch.float64)]
    found = combined("dare_linear", ones, [2.0], 0.25)
    assert set(found.unique().tolist()) == {0.0, 8.0}
    assert abs(float(found.mean()) - 2.0) < 0.05  # six deviations
    both = combined("dare_ties", [*ones, -3 * ones[0]], [1.0, 1.0], 1.0)
    assert both.unique().tolist() == [-3.0]  # the elected sign's alone


def test_a_density_of_one_drops_nothing() -> None:
    wanted = combined("linear", tensors(), WEIGHTS)
    for way in ("magnitude_prune", "dare_linear"):
        torch.testing.assert_close(combined(way, tensors(), WEIGHTS, 1.0), wanted)


@pytest.mark.parametrize("rank", [1, 3, 4, 7])
def test_factors_are_the_nearest_of_their_rank(rank: int) -> None:
    matrix = tensors()[0]
    a, b = factors(matrix, rank)
    assert (a.shape, b.shape) == ((rank, 5), (4, rank))
    left = np.linalg.svd(matrix.numpy(), compute_uv=False)[rank:]
    assert float((matrix - b @ a).norm()) == pytest.approx(float(np.sqrt((left**2).sum())), abs=1e-12)
    cut_a, cut_b = factors(matrix, rank, clamp=0.9)
    highest = max(float(cut_a.abs().max()), float(cut_b.abs().max()))
    numbers = torch.cat([b[:, :4].flatten(), a[:4].flatten()])  # without the zeros beyond the matrix's own rank
    assert highest == pytest.approx(float(torch.quantile(numbers, 0.9)), abs=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"way": "tie"}, "combination_type: expected one of .* Did you mean 'ties'"),
        ({"way": "ties"}, "density: expected a number in \\(0, 1\\] for 'ties', got None"),
        ({"way": "dare_linear", "density": 1.5}, "got 1.5"),
        ({"way": "linear", "sign": "mean"}, "majority_sign_method"),
    ],
)
def test_what_is_asked_wrongly_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        combined(tensors=tensors(), weights=WEIGHTS, **options)
