"""The learning-rate search of a comparison, on worths that are known."""

from __future__ import annotations

import math
import random

import pytest

from kilotune.errors import ConfigError
from kilotune.experiments.compare.search import Found, Search, Worth, halve


class Hill:
    """Worth falls with the distance from ``best`` in decades; short runs rank as long ones do. Keeps count."""

    def __init__(self, best: float, diverges_above: float = math.inf) -> None:
        self.best, self.limit = best, diverges_above
        self.runs: list[tuple[float, float]] = []

    def __call__(self, rate: float, share: float) -> Worth:
        self.runs.append((rate, share))
        if rate > self.limit:
            return -math.inf, -math.inf
        return share - abs(math.log10(rate / self.best)), 0.0


SEARCH = Search(lowest=1e-4, highest=1.0, points=9, rounds=3, reduction=2, spare=2)


def test_the_grid_is_even_in_the_logarithm_and_neat() -> None:
    assert SEARCH.grid == (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2, 0.1, 0.316, 1.0)


def test_the_plan_is_that_of_successive_halving() -> None:
    assert SEARCH.plan == ((9, 0.25), (5, 0.5), (3, 1.0))
    assert SEARCH.cost == 9 * 0.25 + 5 * 0.5 + 3 + 2
    assert SEARCH.budget == "9 rates x 0.25 + 5 rates x 0.5 + 3 rates x 1 + 2 x 1 = 9.75 runs of full length"
    third = Search(points=9, rounds=3, reduction=3, spare=0)
    assert third.plan == ((9, pytest.approx(1 / 9)), (3, pytest.approx(1 / 3)), (1, 1.0))
    assert Search(points=4, rounds=1, spare=0).cost == 4


@pytest.mark.parametrize("exponent", [-6, -4, -3.9, -2.6, -1.1, -0.5, 0, 0.4, 2])
def test_every_search_spends_the_same_wherever_the_best_rate_lies(exponent: float) -> None:
    hill = Hill(10**exponent)
    found = halve(SEARCH, hill)
    assert sum(share for _, share in hill.runs) == SEARCH.cost
    assert len(set(hill.runs)) == len(hill.runs), "a run was made twice"
    assert [(one.rate, one.share) for one in found.tries] == hill.runs


@pytest.mark.parametrize("seed", range(20))
def test_what_is_found_is_the_best_of_all_runs_of_full_length(seed: int) -> None:
    best = 10 ** random.Random(seed).uniform(-4, 0)
    hill = Hill(best)
    found = halve(SEARCH, hill)
    full = [rate for rate, share in hill.runs if share == 1]
    assert found.rate == min(full, key=lambda rate: abs(math.log10(rate / best)))
    assert found.rate is not None
    assert abs(math.log10(found.rate / best)) <= 0.26  # half of the grid's half decades
    assert found.edge is None or found.rate in (1e-4, 1.0)


def test_short_runs_go_on_in_the_order_of_their_worth() -> None:
    hill = Hill(3e-3)
    halve(SEARCH, hill)
    halves = sorted(rate for rate, share in hill.runs if share == 0.5)
    assert halves == [3.16e-4, 1e-3, 3.16e-3, 1e-2, 3.16e-2]
    assert sorted(rate for rate, share in hill.runs[:17] if share == 1) == [1e-3, 3.16e-3, 1e-2]


def test_a_winner_at_the_edge_sends_the_spare_runs_beyond() -> None:
    low, high = Hill(1e-9), Hill(1e9)
    found = halve(SEARCH, low)
    assert [one.rate for one in found.tries[-2:]] == [3.16e-5, 9.99e-6]
    assert (found.rate, found.edge) == (9.99e-6, "lowest")
    found = halve(SEARCH, high)
    assert [one.rate for one in found.tries[-2:]] == [3.16, 9.99]
    assert (found.rate, found.edge) == (9.99, "highest")


def test_an_optimum_just_beyond_the_grid_is_found_and_is_no_edge() -> None:
    found = halve(SEARCH, Hill(3.0))
    assert (found.rate, found.edge) == (3.16, None)


def test_a_winner_inside_sends_them_between_its_neighbours() -> None:
    found = halve(SEARCH, Hill(1e-2))
    assert (found.rate, found.edge) == (1e-2, None)
    assert [one.rate for one in found.tries[-2:]] == [0.0178, 0.00562]
    refined = halve(SEARCH, Hill(6e-3))
    assert refined.rate == 0.00562


def test_without_spare_runs_the_edge_is_said() -> None:
    assert halve(Search(spare=0), Hill(7.0)).edge == "highest"


def test_equal_scores_are_decided_by_the_loss() -> None:
    def flat(rate: float, share: float) -> Worth:
        return 0.5, -abs(math.log10(rate / 1e-2))

    assert halve(SEARCH, flat).rate == 1e-2


def test_rates_that_diverge_are_passed_over() -> None:
    found = halve(SEARCH, Hill(0.05, diverges_above=0.05))
    assert found.rate is not None
    assert 0.01 <= found.rate <= 0.05


def test_where_all_diverge_smaller_rates_are_tried_and_none_is_named() -> None:
    found = halve(SEARCH, Hill(1.0, diverges_above=1e-9))
    assert isinstance(found, Found)
    assert (found.rate, found.edge) == (None, None)
    assert [one.rate for one in found.tries[-2:]] == [3.16e-5, 9.99e-6]
    saved = halve(SEARCH, Hill(1.0, diverges_above=4e-5))
    assert saved.rate == 3.16e-5


def test_bad_settings_are_told_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Search(points=1, rounds=0, spare=-1)
    text = str(caught.value)
    for name in ("search.points", "search.rounds", "search.spare"):
        assert name in text
    with pytest.raises(ConfigError, match="search.highest: expected more than lowest"):
        Search(lowest=1.0, highest=0.1)
    with pytest.raises(ConfigError, match="Did you mean 'points'"):
        Search(point=3)
