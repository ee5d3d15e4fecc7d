"""A covering array of strength two: few rows of many, in which each two values meet that meet in any of the many.

Kuhn, Wallace and Gallo (2004) on why: nearly all faults come of one value or of two together. The rows are those that
there are, not all combinations of values: a method that no quantised layer takes has no row there.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

import numpy as np

__all__ = ["Row", "covering", "meetings"]

Row = tuple[str | None, ...]  # a value of each factor, None where the row has none
_Ints = np.ndarray[tuple[int], np.dtype[np.int64]]
_SCALE = 10**6  # scores are whole numbers, so that no sum is rounded


def covering(rows: Sequence[Row], costs: Sequence[int]) -> list[int]:
    """The places of some rows, in which each two values of two factors meet that meet in any row.

    Greedy: each time the row with the most new pairs for its cost (whole numbers from 1 on), then those are left out
    again of which the others have all pairs, dear ones first. The same rows give the same choice in any order: equal
    ones are told apart by a checksum, so that the choice is spread over all values.
    """
    names = [repr(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda place: (zlib.crc32(names[place].encode()), names[place]))
    pairs = _pairs([rows[place] for place in order])
    price = np.array([costs[place] for place in order], dtype=np.int64)
    taken = _pruned(_greedy(pairs, price), pairs, price)
    return sorted(order[place] for place in taken)


def meetings(rows: Sequence[Row]) -> int:
    """How many pairs of values meet in the rows."""
    return int(_pairs(rows).max()) + 1


def _pairs(rows: Sequence[Row]) -> _Ints:
    """(rows, pairs of factors) -> the number of the pair of values, -1 where one of the two has none."""
    codes = [_codes(column) for column in zip(*rows, strict=True)]
    found, known = [], 0
    for one, other in itertools.combinations(codes, 2):
        there = (one >= 0) & (other >= 0)
        numbers = np.full(len(rows), -1, dtype=np.int64)
        values, places = np.unique(one[there] * (1 + other.max()) + other[there], return_inverse=True)
        numbers[there] = known + places
        known += len(values)
        found.append(numbers)
    return np.stack(found, axis=1)


def _codes(column: Sequence[str | None]) -> _Ints:
    """Values as numbers from 0 on; None is -1."""
    known: dict[str | None, int] = {value: number for number, value in enumerate(sorted({*column} - {None}))}
    known[None] = -1
    return np.array([known[value] for value in column], dtype=np.int64)


def _greedy(pairs: _Ints, price: _Ints) -> list[int]:
    worth = _SCALE // price
    score = (pairs >= 0).sum(axis=1) * worth
    # The rows of each pair, one after the other: those of pair p are holders[starts[p] : starts[p + 1]].
    flat = pairs.reshape(-1)
    by_pair = np.argsort(flat, kind="stable")[(flat < 0).sum() :]
    holders = by_pair // pairs.shape[1]
    starts = np.searchsorted(flat[by_pair], np.arange(flat.max() + 2))
    open_pairs, taken = np.ones(len(starts) - 1, dtype=bool), []
    while open_pairs.any():
        best = int(np.argmax(score))
        taken.append(best)
        for pair in pairs[best]:
            if pair >= 0 and open_pairs[pair]:
                open_pairs[pair] = False
                having = holders[starts[pair] : starts[pair + 1]]
                score[having] -= worth[having]
    return taken


def _pruned(taken: list[int], pairs: _Ints, price: _Ints) -> list[int]:
    """Without the rows whose pairs are all in others."""
    own = {place: pairs[place][pairs[place] >= 0] for place in taken}
    times = np.bincount(np.concatenate(list(own.values())))
    kept = set(taken)
    for place in sorted(taken, key=lambda place: -price[place]):
        if (times[own[place]] > 1).all():
            times[own[place]] -= 1
            kept.remove(place)
    return sorted(kept)
