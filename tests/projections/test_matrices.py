"""The frozen matrices are what docs/projections.md defines: held against integers alone, and against PEFT's."""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kilotune.errors import CheckpointError, ConfigError
from kilotune.projections.matrices import (
    Extent,
    Pair,
    PeftSource,
    PortableSource,
    StoredSource,
    block_of_shape,
    pair_checksum,
    unit_rows,
)
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "projections.md"
LAST_SEED = 2**64 - 1
WORD = 2**64 - 1
Rows = Callable[..., Any]

# -- Philox4x64-10 in integers (Salmon et al., SC 2011), independent of NumPy ---------------------------


def philox(counter: list[int], key: tuple[int, int]) -> list[int]:
    """One block: ten rounds on four 64-bit words."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high, low = divmod(0xD2E7470EE14C6C93 * x0, 2**64)
        upper, lower = divmod(0xCA5A826395121157 * x2, 2**64)
        x0, x1, x2, x3 = upper ^ x1 ^ k0, lower, high ^ x3 ^ k1, low
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return [x0, x1, x2, x3]


def integer_row(seed: int, matrix: int, row: int, columns: int, block: int = 0) -> list[int]:
    """The entries of one row times 2^23, as integers."""
    halves: list[int] = []
    number = 0
    while len(halves) < columns:
        number += 1  # the first block is that of counter 1
        for word in philox([number, 0, row, block], (seed, matrix)):
            halves += [word & 0xFFFFFFFF, word >> 32]
    return [(half >> 8) - 2**23 for half in halves[:columns]]


def check_rows(rows: Rows, seed: int, matrix: int, first: int, count: int, columns: int, shape: Any = None) -> None:
    """``rows`` (a function like unit_rows) gives the defined entries, exactly, in float32."""
    made = rows(seed, matrix, count, columns, shape=shape, first_row=first)
    assert made.dtype == np.float32
    assert made.shape == (count, columns)
    block = 0 if shape is None else 1 + shape[1] * 2**32 + shape[0]
    scaled = made.astype(np.float64) * 2.0**23
    for i in range(count):
        assert scaled[i].tolist() == [float(n) for n in integer_row(seed, matrix, first + i, columns, block)]


CASES: dict[str, tuple[int, int, int, int, int, Any]] = {
    "A": (0, 0, 0, 4, 21, None),
    "B": (0, 1, 0, 4, 21, None),
    "one column": (3, 0, 0, 5, 1, None),
    "odd columns": (3, 1, 2, 2, 7, None),
    "a block and one more": (12345, 0, 0, 2, 9, None),
    "late rows": (7, 1, 4095, 2, 13, None),
    "a row beyond 32 bits": (7, 0, 2**40, 2, 9, None),
    "the last seed": (LAST_SEED, 0, 0, 3, 17, None),
    "the last seed, B": (LAST_SEED, 1, 5, 3, 17, None),
    "a seed beyond 63 bits": (2**63, 1, 0, 2, 12, None),
    "a shape": (0, 0, 0, 3, 11, (120, 80)),
    "a shape, B": (0, 1, 0, 3, 11, (120, 80)),
    "the turned shape": (0, 0, 0, 3, 11, (80, 120)),
    "the largest shape": (LAST_SEED, 1, 9, 2, 11, (2**32 - 1, 2**31 - 1)),
}


def test_the_integer_reference_is_philox() -> None:
    """The known answers that Random123 publishes for philox4x64-10."""
    assert philox([0] * 4, (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox([WORD] * 4, (WORD, WORD)) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_against_integers(case: tuple[int, int, int, int, int, Any]) -> None:
    seed, matrix, first, count, columns, shape = case
    check_rows(unit_rows, seed, matrix, first, count, columns, shape)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, LAST_SEED),
    matrix=st.integers(0, 1),
    first=st.integers(0, 2**20),
    columns=st.integers(1, 30),
    shape=st.none() | st.tuples(st.integers(1, 2**32 - 1), st.integers(1, 2**31 - 1)),
)
def test_any_row_against_integers(seed: int, matrix: int, first: int, columns: int, shape: Any) -> None:
    check_rows(unit_rows, seed, matrix, first, 1, columns, shape)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, LAST_SEED),
    matrix=st.integers(0, 1),
    rows=st.integers(1, 12),
    columns=st.integers(1, 40),
    data=st.data(),
)
def test_everything_nests(seed: int, matrix: int, rows: int, columns: int, data: st.DataObject) -> None:
    """Any block, by itself, holds the numbers that it has in the larger matrix."""
    whole = unit_rows(seed, matrix, rows, columns)
    first = data.draw(st.integers(0, rows - 1))
    count = data.draw(st.integers(1, rows - first))
    width = data.draw(st.integers(1, columns))
    part = unit_rows(seed, matrix, count, width, first_row=first)
    assert np.array_equal(part, whole[first : first + count, :width])


def fault(**wrong: Any) -> Rows:
    """unit_rows with something wrong in it."""

    def rows(seed: int, matrix: int, count: int, columns: int, *, shape: Any = None, first_row: int = 0) -> Any:
        block = 0 if shape is None or "no block" in wrong else 1 + shape[1] * 2**32 + shape[0]
        if shape is not None and "turned" in wrong:
            block = 1 + shape[0] * 2**32 + shape[1]
        key = np.array([seed, matrix][:: wrong.get("keys", 1)], dtype=np.uint64)
        made = np.empty((count, columns), dtype=np.float32)
        for i in range(count):
            row = first_row + i + wrong.get("off", 0)
            counter = np.array([0, 0, row, block], dtype=np.uint64)
            generator = np.random.Philox(key=key, counter=counter)
            raw = generator.random_raw(columns + 8)[wrong.get("skip", 0) :]
            halves = raw.view("<u4").reshape(-1, 2)[:, :: wrong.get("halves", 1)].reshape(-1)[:columns]
            made[i] = (halves >> np.uint32(wrong.get("shift", 8))) * 2.0 ** -(31 - wrong.get("shift", 8)) - 1
        return made

    return rows


FAULTS: dict[str, Rows] = {
    "the high half first": fault(halves=-1),
    "the key's words changed about": fault(keys=-1),
    "a block skipped": fault(skip=4),
    "rows from 1": fault(off=1),
    "one bit fewer": fault(shift=9),
    "no block of a shape": fault(**{"no block": True}),
    "the shape turned": fault(turned=True),
}


@pytest.mark.parametrize("rows", FAULTS.values(), ids=FAULTS)
def test_planted_faults_in_rows_are_found(rows: Rows) -> None:
    check_rows(fault(), 5, 1, 3, 2, 9, (120, 80))  # the planting itself is right when nothing is planted
    with pytest.raises(AssertionError):
        check_rows(rows, 5, 1, 3, 2, 9, (120, 80))


# -- what the numbers are like --------------------------------------------------------------------------


def test_entries_lie_on_the_grid() -> None:
    """Multiples of 2^-23 in [-1, 1), so float32 holds them exactly and nothing is rounded."""
    made = unit_rows(1, 0, 64, 4096)
    steps = made.astype(np.float64) * 2.0**23
    assert np.array_equal(steps, np.round(steps))
    assert made.min() >= -1.0
    assert made.max() < 1.0
    assert made.min() < -0.9999
    assert made.max() > 0.9999


@pytest.mark.parametrize("matrix", [0, 1])
def test_statistics(matrix: int) -> None:
    """Uniform in [-1, 1): mean 0, variance 1/3, flat histogram; rows, columns and seeds do not correlate."""
    n = 256 * 4096
    made = unit_rows(42, matrix, 256, 4096).astype(np.float64)
    assert abs(made.mean()) < 5 * math.sqrt(1 / 3 / n)
    assert abs(made.var() - 1 / 3) < 5 * math.sqrt(4 / 45 / n)
    counts, _ = np.histogram(made, bins=64, range=(-1, 1))
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 6 * math.sqrt(2 * 63)
    for other in (np.roll(made, 1, axis=0), np.roll(made, 1, axis=1), unit_rows(43, matrix, 256, 4096)):
        assert abs((made * other).mean()) < 5 * (1 / 3) / math.sqrt(n)
    assert abs((made * unit_rows(42, 1 - matrix, 256, 4096)).mean()) < 5 * (1 / 3) / math.sqrt(n)


@pytest.mark.parametrize("rank, out, inn", [(16, 400, 300), (256, 64, 1024)])
def test_gains_make_kaiming_uniform(rank: int, out: int, inn: int) -> None:
    """A within sqrt(6 / in), B within sqrt(6 / r), both near that bound; A keeps the input's size on average."""
    pair = PortableSource(9).build(Extent(rank, inn, out))
    gain = PortableSource(9).gain(rank, inn)
    assert gain == pytest.approx(math.sqrt(6 / inn) * math.sqrt(6 / rank), rel=1e-15)
    a, b = math.sqrt(6 / inn) * pair.a.double(), math.sqrt(6 / rank) * pair.b.double()
    for matrix, fan_in in ((a, inn), (b, rank)):
        bound = math.sqrt(6 / fan_in)
        assert 0.99 * bound < float(matrix.abs().max()) <= bound
        assert float(matrix.var()) == pytest.approx(2 / fan_in, rel=0.05)


# -- shapes, seeds, checksums ---------------------------------------------------------------------------


def test_the_counter_word_of_a_shape() -> None:
    assert block_of_shape(120, 80) == 1 + 80 * 2**32 + 120
    assert block_of_shape(1, 1) != 0  # never the nested pair's
    shapes = [(out, inn) for out in (1, 2, 80, 120, 2**32 - 1) for inn in (1, 2, 80, 120, 2**31 - 1)]
    assert len({block_of_shape(*shape) for shape in shapes}) == len(shapes)
    assert max(block_of_shape(*shape) for shape in shapes) < 2**64


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2**32, 5), (5, 2**31), (-1, 5)])
def test_shapes_out_of_range(shape: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(shape))):
        block_of_shape(*shape)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "0", None])
def test_seeds_out_of_range(seed: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected an integer in 0 \.\.\. 2\*\*64 - 1"):
        unit_rows(seed, 0, 1, 1)


def test_different_definitions_give_different_matrices() -> None:
    sources = [PortableSource(0), PortableSource(1), PortableSource(0, (8, 8)), PortableSource(0, (8, 9))]
    pairs = [source.build(Extent(4, 8, 8)) for source in sources]
    assert len({tensor.numpy().tobytes() for pair in pairs for tensor in (pair.a, pair.b)}) == 8


def test_checksum_by_its_definition() -> None:
    """SHA-256 over "(rows, columns);" and the little-endian float32 bytes, of a and b of each pair in turn."""
    pairs = [PortableSource(3).build(Extent(2, 5, 3)), PortableSource(3, (3, 5)).build(Extent(2, 5, 3))]
    digest = hashlib.sha256()
    for pair in pairs:
        for tensor in (pair.a, pair.b):
            rows = tensor.tolist()
            digest.update(f"({len(rows)}, {len(rows[0])});".encode())
            digest.update(b"".join(struct.pack("<f", value) for row in rows for value in row))
    assert pair_checksum(pairs) == digest.hexdigest()
    changed = Pair(pairs[0].a.clone(), pairs[0].b)
    changed.a[1, 4] = torch.nextafter(changed.a[1, 4], torch.tensor(2.0))  # one step of the last bit
    assert pair_checksum([changed, pairs[1]]) != digest.hexdigest()
    assert pair_checksum(pairs[::-1]) != digest.hexdigest()


def test_stored_matrices_are_known_by_their_values() -> None:
    a, b = torch.randn(3, 5), torch.randn(7, 3)
    one, same, other = StoredSource.of(a, b), StoredSource.of(a.clone(), b.clone()), StoredSource.of(a, b + 1)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert one.extent == Extent(3, 5, 7)
    assert torch.equal(one.build(Extent(3, 5, 7)).b, b.T)
    assert one.gain(3, 5) == 1.0
    for other_base in (Extent(3, 6, 7), Extent(3, 5, 6), Extent(2, 5, 7)):
        with pytest.raises(CheckpointError, match=r"rank 3, in 5, out 7, but .* another base"):
            one.build(other_base)


# -- PEFT's matrices ------------------------------------------------------------------------------------

PEFT_CASES = [(0, 4, 6, 9), (1, 16, 50, 100), (12345, 3, 1, 1), (2**63 + 1, 7, 33, 5), (LAST_SEED, 1, 8, 8)]


@pytest.mark.parametrize("key, rank, inn, out", PEFT_CASES)
def test_peft_matrices_bit_for_bit(key: int, rank: int, inn: int, out: int) -> None:
    vera = pytest.importorskip("peft.tuners.vera.model", reason="PEFT is the oracle here")  # seconds to import
    generator = torch.Generator(device="cpu").manual_seed(key)
    a = vera._kaiming_init((rank, inn), generator=generator)
    b = vera._kaiming_init((out, rank), generator=generator)
    extent = Extent(rank, inn, out)
    pair = PeftSource(key, extent).build(extent)
    assert torch.equal(pair.a, a)
    assert torch.equal(pair.b.T, b)
    assert pair.b.is_contiguous()


def test_peft_matrices_depend_on_the_targets() -> None:
    """Why they cannot be shared: the same key in another extent is another matrix, and asking for more is refused."""
    small, large = Extent(2, 3, 4), Extent(2, 5, 4)
    one, other = PeftSource(0, small), PeftSource(0, large)
    assert one != other
    assert not torch.equal(one.build(small).a, other.build(large).a[:, :3])
    with pytest.raises(ConfigError, match="do not cover"):
        one.build(large)


# -- the numbers in the documentation -------------------------------------------------------------------

NUMBERS = re.compile(
    r"^seed (?P<seed>\d+) +(?P<pair>nested|shape \((?P<out>\d+), (?P<inn>\d+)\)) +"
    r"U_(?P<matrix>[AB])\[(?P<row>\d+), (?P<first>\d+):(?P<last>\d+)\] = (?P<values>[-+.\de ]+)$",
    re.MULTILINE,
)
PEFT_NUMBERS = re.compile(
    r"^key (?P<key>\d+) +rank (?P<rank>\d+), in (?P<inn>\d+), out (?P<out>\d+) +"
    r"(?P<matrix>[AB])\[(?P<row>\d+), (?P<first>\d+):(?P<last>\d+)\] = (?P<values>[-+.\de ]+)$",
    re.MULTILINE,
)
CHECKSUMS = re.compile(
    r"^seed (?P<seed>\d+) +nested +rank (?P<rank>\d+), in (?P<inn>\d+), out (?P<out>\d+) +"
    r"SHA-256 = (?P<sum>[0-9a-f]{64})$",
    re.MULTILINE,
)


def check_numbers(page: str) -> int:
    """All numbers on the page are the library's, to the last bit; returns how many lines there are."""
    lines = 0
    for match in NUMBERS.finditer(page):
        got = match.groupdict()
        first, last = int(got["first"]), int(got["last"])
        shape = None if got["out"] is None else (int(got["out"]), int(got["inn"]))
        row = unit_rows(int(got["seed"]), "AB".index(got["matrix"]), 1, last, shape=shape, first_row=int(got["row"]))
        assert _grid(got["values"]) == row[0, first:last].tolist(), match.group(0)
        lines += 1
    for match in PEFT_NUMBERS.finditer(page):
        got = match.groupdict()
        extent = Extent(*(int(got[key]) for key in ("rank", "inn", "out")))
        pair = PeftSource(int(got["key"]), extent).build(extent)
        matrix = pair.a if got["matrix"] == "A" else pair.b.T
        values = matrix[int(got["row"]), int(got["first"]) : int(got["last"])].tolist()
        assert _float32(got["values"]) == values, match.group(0)
        lines += 1
    for match in CHECKSUMS.finditer(page):
        got = match.groupdict()
        extent = Extent(*(int(got[key]) for key in ("rank", "inn", "out")))
        assert pair_checksum([PortableSource(int(got["seed"])).build(extent)]) == got["sum"], match.group(0)
        lines += 1
    return lines


def _grid(text: str) -> list[float]:
    """Decimals of a few digits name the nearest multiple of 2^-23."""
    return [round(float(value) * 2**23) / 2**23 for value in text.split()]


def _float32(text: str) -> list[float]:
    return [float(np.float32(value)) for value in text.split()]


def test_the_numbers_in_the_documentation() -> None:
    page = PAGE.read_text(encoding="utf-8")
    fenced = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    assert check_numbers(page) == len(lines) >= 16
    for golden in (
        "-0.93051624 -0.97690654 0.22390044 -0.5169016 -0.2690375 -0.77714837",
        "0.3838023 0.2872734 0.09277177",
    ):
        assert golden in page
    for golden in ("0.95025074 0.62670803 -0.4052421", "-0.59922385 -0.64809644 0.03591645"):
        assert golden in page
    assert "0.14162624 0.54344285 -0.49458194 0.16172433" in page


@pytest.mark.parametrize(
    "old, new", [("-0.93051624", "-0.93051636"), ("0.62670803", "-0.62670803"), ("nested   U_A", "nested   U_B")]
)
def test_a_wrong_number_in_the_documentation_is_noticed(old: str, new: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert old in page
    with pytest.raises(AssertionError):
        check_numbers(page.replace(old, new))


def test_golden_numbers() -> None:
    """Those that the library was ordered with."""
    assert (
        _grid("-0.93051624 -0.97690654 0.22390044 -0.5169016 -0.2690375 -0.77714837")
        == unit_rows(0, 0, 1, 6)[0].tolist()
    )
    assert _grid("0.3838023 0.2872734 0.09277177") == unit_rows(0, 0, 2, 3)[1].tolist()
    assert _grid("0.95025074 0.62670803 -0.4052421") == unit_rows(0, 1, 1, 3)[0].tolist()
    assert _grid("-0.59922385 -0.64809644 0.03591645") == unit_rows(0, 1, 2, 3)[1].tolist()
    assert _grid("0.14162624 0.54344285 -0.49458194 0.16172433") == unit_rows(7, 1, 4, 4)[3].tolist()
