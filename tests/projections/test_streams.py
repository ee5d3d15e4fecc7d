"""The streams for model-wide vectors are what docs/projections.md defines: held against Python's integers alone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilotune.errors import ConfigError
from kilotune.projections import streams
from tests.conformance.one_vector import dense_matrix, indices, words
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "projections.md"
LAST_SEED = 2**64 - 1
SEEDS = st.integers(0, LAST_SEED)


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    matrix=st.integers(2, 7),
    site=st.integers(0, 2**32 - 1),
    first=st.integers(0, 30),
    count=st.integers(0, 20),
)
def test_words(seed: int, matrix: int, site: int, first: int, count: int) -> None:
    assert (
        streams.raw_words(seed, matrix, site, first, count).tolist() == words(seed, matrix, site, first + count)[first:]
    )


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, site=st.integers(0, 9), first=st.integers(0, 150), count=st.integers(0, 150))
def test_signs(seed: int, site: int, first: int, count: int) -> None:
    bits = sum(word << (64 * q) for q, word in enumerate(words(seed, 2, site, 5)))
    assert streams.signs(seed, site, first, count).tolist() == [
        1 - 2 * (bits >> r & 1) for r in range(first, first + count)
    ]


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, low=st.integers(0, 6), first=st.integers(0, 4), count=st.integers(1, 4))
def test_permutations(seed: int, low: int, first: int, count: int) -> None:
    size = 2**low
    keys = words(seed, 3, 5, (first + count) * size)
    for row, k in zip(streams.permutations(seed, 5, size, first, count), range(first, first + count)):
        block = keys[k * size : (k + 1) * size]
        assert row.tolist() == sorted(range(size), key=lambda j, b=block: (b[j] >> low, j))


def test_equal_keys_go_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upper bits decide, and nothing of the lower ones."""
    keys = np.array([8 + 3, 8 + 0, 0 + 2, 8 + 1], dtype=np.uint64)
    monkeypatch.setattr(streams, "raw_words", lambda *args: keys.copy())
    assert streams.permutations(0, 0, 4, 0, 1).tolist() == [[2, 0, 1, 3]]
    assert streams.balanced_indices(0, [4], 4)[0].tolist() == [1, 2, 0, 3]


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, site=st.integers(0, 9), first=st.integers(0, 9), count=st.integers(0, 9))
def test_gaussians(seed: int, site: int, first: int, count: int) -> None:
    parts = words(seed, 4, site, 3 * (first + count))
    sums = [
        sum(parts[3 * r + i] >> (16 * q) & 0xFFFF for i in range(3) for q in range(4))
        for r in range(first, first + count)
    ]
    got = streams.gaussians(seed, site, first, count)
    assert got.dtype == np.float32
    assert [float(g) * 65536 + 393210 for g in got] == sums


def test_the_largest_gaussians_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits zero, and all ones: no sum overflows."""
    monkeypatch.setattr(streams, "raw_words", lambda *args: np.array([0] * 3 + [2**64 - 1] * 3, dtype=np.uint64))
    assert streams.gaussians(0, 0, 0, 2).tolist() == [-393210 / 65536, 393210 / 65536]


def test_gaussians_are_nearly_normal() -> None:
    """Moments within 5 standard errors of those of a sum of twelve uniform numbers (kurtosis 3 - 0.1)."""
    g = streams.gaussians(1, 0, 0, 2**18).astype(np.float64)
    count = g.size
    assert abs(g.mean()) < 5 / count**0.5
    assert abs((g**2).mean() - 1) < 5 * (1.9 / count) ** 0.5
    assert abs((g**3).mean()) < 5 * (13.6 / count) ** 0.5
    assert abs((g**4).mean() - 2.9) < 5 * (80 / count) ** 0.5
    assert abs((g[1:] * g[:-1]).mean()) < 5 / count**0.5
    other = streams.gaussians(1, 1, 0, count).astype(np.float64)
    assert abs((g * other).mean()) < 5 / count**0.5  # sites are independent


def test_signs_and_permutations_are_even() -> None:
    signs = streams.signs(3, 0, 0, 2**18).astype(np.float64)
    assert abs(signs.mean()) < 5 / signs.size**0.5
    rows = streams.permutations(3, 0, 8, 0, 20000)
    assert (np.sort(rows, axis=1) == np.arange(8)).all()
    counts = np.array([[(rows[:, place] == value).sum() for value in range(8)] for place in range(8)])
    assert abs(counts - 2500).max() < 5 * (20000 * 7 / 64) ** 0.5


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, first=st.integers(0, 4), count=st.integers(0, 4), size=st.integers(1, 5))
def test_dense_rows(seed: int, first: int, count: int, size: int) -> None:
    expected = dense_matrix(seed, 2, first + count, size)[first:]
    assert streams.dense_rows(seed, 2, first, count, size).tolist() == expected.tolist()


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4), d=st.integers(1, 30))
def test_indices(seed: int, sizes: list[int], d: int) -> None:
    got = streams.balanced_indices(seed, sizes, d)
    assert [len(part) for part in got] == sizes
    flat = np.concatenate(got)
    assert flat.tolist() == indices(seed, sizes, d)
    counts = np.bincount(flat, minlength=d)
    assert counts.max() - counts.min() <= 1


def test_a_wrong_seed_or_site_is_refused() -> None:
    for seed in (-1, 2**64, True, 1.0):
        with pytest.raises(ConfigError, match=r"in 0 ... 2\*\*64 - 1"):
            streams.raw_words(seed, 2, 0, 0, 1)  # type: ignore[arg-type]
    for site in (-1, 2**32):
        with pytest.raises(ConfigError, match="the number of a layer"):
            streams.raw_words(0, 2, site, 0, 1)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, total=st.integers(1, 200), part=st.integers(0, 100))
def test_places_are_those_of_the_stream_each_once(seed: int, total: int, part: int) -> None:
    count = total * part // 100
    found = streams.distinct_places(seed, total, count).tolist()
    assert len(set(found)) == len(found) == count
    assert all(0 <= place < total for place in found)
    less = total - count if 2 * count > total else count
    drawn = list(dict.fromkeys(word % total for word in words(seed, 7, 0, 4 * total + 40)))[:less]
    assert found == (sorted(set(range(total)) - set(drawn)) if 2 * count > total else drawn)


# -- the numbers in the documentation -----------------------------------------------------------------

LINE = re.compile(
    r"seed (?P<seed>\d+) +(?:site (?P<site>\d+) +(?:(?P<kind>signs|gaussians|dense)\[(?P<first>\d+):(?P<last>\d+)\]"
    r"|permutation (?P<block>\d+) of (?P<size>\d+))|places (?P<sizes>[\d ]+?) +of (?P<d>\d+) +indices"
    r"|of (?P<total>\d+) +(?P<count>\d+) different places) = (?P<values>.+)"
)


def library(got: dict[str, Any]) -> list[float]:
    """The numbers that a line names."""
    seed = int(got["seed"])
    if got["sizes"]:
        sizes = [int(size) for size in got["sizes"].split()]
        return np.concatenate(streams.balanced_indices(seed, sizes, int(got["d"]))).tolist()
    if got["total"]:
        return streams.distinct_places(seed, int(got["total"]), int(got["count"])).tolist()
    site = int(got["site"])
    if got["block"]:
        return streams.permutations(seed, site, int(got["size"]), int(got["block"]), 1)[0].tolist()
    first, count = int(got["first"]), int(got["last"]) - int(got["first"])
    if got["kind"] == "dense":
        return streams.dense_rows(seed, site, first, count, 1)[:, 0].tolist()
    return (streams.signs if got["kind"] == "signs" else streams.gaussians)(seed, site, first, count).tolist()


def check_page(page: str) -> int:
    lines = re.search(r"^```none\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert lines is not None
    for line in lines.group(1).splitlines():
        match = LINE.fullmatch(line)
        assert match is not None, line
        values = [float(np.float32(value)) for value in match["values"].split()]
        assert values == library(match.groupdict()), line
    return len(lines.group(1).splitlines())


def test_the_numbers_in_the_documentation() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert check_page(page) >= 8
    for old, new in (("1.378265380859375", "1.3782806396484375"), ("= 5 1 2", "= 5 2 1"), ("0.5485511", "0.5485512")):
        assert old in page
        with pytest.raises(AssertionError):
            check_page(page.replace(old, new))
