"""Write docs/support.md: which method works on which layer kind and in which storage.

    python scripts/support_table.py [--check]

Nothing here is decided by hand. A tick is a cell that the conformance tests (tests/conformance/) run, all of them in
`make test-full`; a reason is what the library itself refuses that cell with. ``--check`` writes nothing, and fails
where the page is out of date.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "support.md"
TICK = "✓"

HEAD = """# What works with what

This page is made by `python scripts/support_table.py` from the conformance tests, and a test compares the two. A tick
means that the whole suite of `tests/conformance/` runs on that pair in `make test-full`: the start is the base, forward
and gradients are those of a formula written separately, every trained number gets a gradient, the count follows the
formula, merged equals unmerged, disabled is the base bit for bit, saved and loaded is the same file, several adapters,
16 bits, `torch.compile`. `make test` runs a covering array of it: some test on every pair, and each test on every
method, every layer kind and every storage that it is for (`python scripts/covering_array.py` prints which). A letter is
the reason why a pair is refused, when the adapter is added, with an error that says so.
"""
KINDS = """
## Methods and layer kinds

The rows are the names that `kilotune.get_config` takes, the columns the kinds of layers, with weights in plain floats.
*Merges*: into the weights; *adds up*: several of them can be active in one layer at the same time.
"""
STORAGES = """
## Methods and storages

A quantised layer is always a linear one: the vendors' kernels are for linear layers only, so the other kinds exist in
plain floats alone.
"""


def tables() -> tuple[Any, Any]:
    """The cells of the conformance tests: (in plain floats, quantised)."""
    sys.path[:0] = [str(ROOT / "src"), str(ROOT)]
    return importlib.import_module("tests.conformance.cells"), importlib.import_module("tests.conformance.quantised")


class Reasons:
    """Letters for reasons, in the order in which they come up."""

    def __init__(self, first: str = "a") -> None:
        self.letters: dict[str, str] = {}
        self.first = first

    def letter(self, reason: str) -> str:
        return self.letters.setdefault(reason, chr(ord(self.first) + len(self.letters)))

    def legend(self) -> Iterable[str]:
        return (f"- {letter}: {reason}" for reason, letter in self.letters.items())


def why(cell: Any) -> str:
    """What the library says about a cell that it refuses: which need of the delta the kind does not meet."""
    lacking = sorted(cell.makes.needs - cell.part.offers, key=lambda need: need.name)
    words = {"LINEAR": "not linear", "BIAS": "no bias slot", "OUTPUT": "no output to add to"}
    parts = []
    for need in lacking:
        more = cell.part.lacks.get(need)
        parts.append(f"{words[need.name]}: {more or f'the method needs {need.value}'}")
    return "; ".join(parts)


def plain(cells: Any) -> list[str]:
    """The table of methods and layer kinds."""
    kinds = list(dict.fromkeys(cell.kind.partition(":")[0] for cell in cells.ALL))
    methods = [name for name in cells.METHOD_CASES if name not in cells.TOYS]
    reasons, rows = Reasons(), []
    for method in methods:
        row, makes = [f"`{method}`"], None
        for kind in kinds:
            own = [c for c in cells.ALL if c.case.name == method and c.kind.partition(":")[0] == kind]
            makes = own[0].makes if own else makes
            ran = [c for c in own if c.fits and c.reason("*") is None]
            if ran:
                row.append(TICK)
            elif own:
                row.append(reasons.letter(own[0].reason("*") or why(own[0])))
            else:
                row.append("?")
        assert makes is not None
        row += [TICK if makes.mergeable else "no", TICK if makes.additive else "no"]
        rows.append(row)
    return [*markdown(["", *kinds, "*merges*", "*adds up*"], rows), "", *reasons.legend(), *notes(cells)]


def notes(cells: Any) -> list[str]:
    """The single tests that are left out of cells with a tick."""
    lines = []
    for (method, kind, storage, test), reason in cells.EXCEPTIONS.items():
        if test != "*":
            where = " on ".join(part for part in (method, kind, storage) if part not in ("*", "dense")) or "everywhere"
            lines.append(f"- {where}, in the test “{test}”: {reason}")
    return ["", "Left out of cells with a tick, each for its reason:", "", *lines] if lines else []


def quantised(cells: Any, more: Any) -> list[str]:
    """The table of methods and storages."""
    schemes = {f"{s.storage} {s.name}": s for s in more.STORAGE_SCHEMES}
    away = dict(more.NEEDS_GPU)
    methods = [name for name in cells.METHOD_CASES if name not in cells.TOYS]
    reasons, rows = Reasons("p"), []
    for method in methods:
        row = [f"`{method}`"]
        first = next(c for c in cells.ALL if c.case.name == method)
        ran = {(c.scheme.storage, c.scheme.name) for c in more.QUANTISED if c.case.name == method}
        linear = any(c.fits for c in cells.ALL if c.case.name == method and c.kind == "linear")
        for scheme in schemes.values():
            fits = (scheme.storage, scheme.name) in ran
            # A method that could run and has no cell is a gap, not a refusal: the test of this page finds the "?".
            row.append(TICK if fits else "?" if linear else reasons.letter(why(first)))
        row += [reasons.letter(reason) for reason in away.values()]
        rows.append(row)
    head = ["", *(f"{storage} {name}" for storage, name in (key.split(" ", 1) for key in schemes)), *away]
    return [*markdown(head, rows), "", *reasons.legend()]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [
        f"| {' | '.join(head)} |",
        f"|---|{':-:|' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def render() -> str:
    """The whole page."""
    cells, more = tables()
    lines = [HEAD, KINDS, *plain(cells), STORAGES, *quantised(cells, more)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    page = render()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print(f"error: {PAGE.relative_to(ROOT)} is out of date; run python scripts/support_table.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
