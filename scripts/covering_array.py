"""Print which of the conformance tests (tests/conformance/) run in `make test`, and what they cover.

    python scripts/covering_array.py [--counts]

The product of tests, methods, layer kinds, storages, dtypes and so on runs in `make test-full`. Of it `make test` runs
a covering array: each two values that meet in any test meet in one that is chosen. Nothing is decided by hand: see
tests/conformance/covering.py. ``--counts`` leaves the table of the chosen tests out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Row = tuple[str | None, ...]


def rows() -> tuple[tuple[str, ...], list[Row], list[Row]]:
    """The names of the factors, the rows of all tests, those that are chosen."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    declared: Any = importlib.import_module("tests.conformance.declared")
    found = declared.candidates()
    picked = [one for one in found if (one.test, one.id) in declared.chosen()]
    return declared.factors(), [declared.row(one) for one in found], [declared.row(one) for one in picked]


def counts(factors: Sequence[str], found: Sequence[Row], picked: Sequence[Row]) -> Iterable[str]:
    """The sums: values of each factor, tests, pairs of values."""
    meetings = importlib.import_module("tests.conformance.covering").meetings
    yield f"{len(picked):,} of {len(found):,} tests run in `make test`"
    yield f"{meetings(picked):,} of {meetings(found):,} pairs of values meet in them"
    for name, column, own in zip(factors, zip(*found, strict=True), zip(*picked, strict=True), strict=True):
        yield f"  {name}: {len({*own} - {None})} of {len({*column} - {None})} values"


def table(factors: Sequence[str], picked: Sequence[Row]) -> Iterable[str]:
    """The chosen tests, a column for each factor."""
    lines = [factors, *(tuple(value or "" for value in row) for row in picked)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def main() -> int:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true", help="the sums alone")
    given = parser.parse_args()
    factors, found, picked = rows()
    lines = list(counts(factors, found, picked))
    if not given.counts:
        lines = [*table(factors, picked), "", *lines]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
