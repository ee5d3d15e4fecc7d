"""Routes as data: which level each adapter of a stack is on, and which rows run the same."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from kilotune.layers.route import Route, Stacked, levels_of


@pytest.mark.parametrize(
    ("chains", "levels"),
    [
        ([], {}),
        (["", "a", "b"], {"a": 0, "b": 0}),
        (["ab", "ac", "a"], {"a": 0, "b": 1, "c": 1}),
        (["ab", "b", "c"], {"a": 0, "b": 1, "c": 0}),
        (["ac", "abc"], {"a": 0, "b": 1, "c": 2}),
        (["ab", "bc", "cd"], {"a": 0, "b": 1, "c": 2, "d": 3}),
        (["aa"], None),
        (["ab", "ba"], None),
        (["ab", "bc", "ca", "d"], None),
    ],
)
def test_levels_rise_along_each_chain(chains: list[str], levels: dict[str, int] | None) -> None:
    assert levels_of(chains) == levels


def test_levels_are_the_lowest_that_will_do() -> None:
    """Held against all assignments, for random chains of four keys."""
    draw = random.Random(0)
    for _ in range(60):
        chains = ["".join(draw.choices("abcd", k=draw.randint(0, 3))) for _ in range(draw.randint(1, 4))]
        keys = sorted({*"".join(chains)})
        fits = [
            given
            for values in itertools.product(range(len(keys)), repeat=len(keys))
            if (given := dict(zip(keys, values, strict=True))) is not None
            and all(given[x] < given[y] for chain in chains for x, y in itertools.pairwise(chain))
        ]
        lowest = min(fits, key=lambda given: sum(given.values()), default=None)
        assert levels_of(chains) == lowest, chains


def _cohort(names: str, rows: list[int], index: list[int]) -> Stacked:
    return Stacked(tuple(names), torch.tensor(rows), torch.tensor(index))


def test_chains_are_the_rows_that_run_the_same() -> None:
    shared, own = _cohort("s", [0, 1, 3, 4], [0, 0, 0, 0]), _cohort("ab", [1, 2, 3], [0, 1, 0])
    route = Route(6, [shared], above=[[own]])
    found = [([c.names[which] for c, which in chain.parts], chain.rows.tolist()) for chain in route.chains()]
    assert found == [(["s"], [0, 4]), (["s", "a"], [1, 3]), (["b"], [2])]
    assert route.cohorts == (shared, own)
    assert route.names == {"s", "a", "b"}
    assert route.chains()[1].spread(2, torch.device("cpu")).tolist() == [2, 3, 6, 7]
