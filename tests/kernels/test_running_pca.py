"""The running components against those of all rows at once, in float64."""

from __future__ import annotations

import pytest
import torch

from kilotune.kernels import running_pca
from kilotune.kernels.running_pca import RunningPca
from kilotune.model.explained_variance import shares


def rows(count: int, features: int = 20, rank: int = 6) -> torch.Tensor:
    """Rows about a mean far from zero, in ``rank`` dimensions, each varying by half of the one before."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(features, rank, dtype=torch.float64, generator=generator)).Q
    spread = 0.5 ** torch.arange(rank, dtype=torch.float64)
    return torch.randn(count, rank, dtype=torch.float64, generator=generator) * spread @ basis.T + 3.0


@pytest.mark.parametrize("exact", [True, False])
def test_batches_come_to_the_components_of_all_rows(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, where nothing is thrown away: the rows have no more dimensions than there are components."""
    if not exact:
        monkeypatch.setattr(running_pca, "EXACT", 1)
    every = rows(90)
    pca = RunningPca(6)
    for first, last in ((0, 10), (10, 50), (50, 90)):
        pca.add(every[first:last])
    centred = every - every.mean(0)
    _, values, vh = torch.linalg.svd(centred, full_matrices=False)
    assert pca.components is not None
    torch.testing.assert_close(pca.values, values[:6], rtol=1e-9, atol=0)
    torch.testing.assert_close(pca.ratios, values[:6].square() / centred.square().sum(), rtol=1e-9, atol=0)
    torch.testing.assert_close((pca.components @ vh[:6].T).abs(), torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-7)
    largest = pca.components.gather(1, pca.components.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_likeness_is_one_where_nothing_new_comes() -> None:
    every, pca = rows(40), RunningPca(2)
    pca.add(every)
    assert pca.likeness is None
    pca.add(every)
    assert pca.likeness is not None
    torch.testing.assert_close(pca.likeness, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    pca.add(every.roll(7, dims=1) * 100)
    assert float(pca.likeness.max()) < 0.99


def test_ranks_go_to_what_explains_most() -> None:
    ratios = {"a": [0.5, 0.3, 0.1], "b": [0.9, 0.05], "c": [0.01, 0.01]}
    assert shares(ratios, 3) == {"a": 2, "b": 1, "c": 0}
    assert shares(ratios, 7) == {"a": 3, "b": 2, "c": 2}
    assert shares({"a": [0.5, 0.5], "b": [0.5, 0.5]}, 3) == {"a": 2, "b": 1}
