"""What each conformance test runs on, as data, and what of that is in `make test`.

``every_cell`` and ``every_quantised_cell`` declare it, test by test. The product of all of it runs in `make test-full`;
`make test` runs a covering array: each two of test, method, kind, bias, storage, dtype and whatever else a test is
given meet in one of its tests. It is computed over all of the conformance tests, whichever of them are asked for, so
that a test is in it or not, and never now and then. `python scripts/covering_array.py` prints it.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, final

import pytest

from tests.conformance.cells import CELLS, Cell, excepted
from tests.conformance.covering import Row, covering
from tests.conformance.quantised import QUANTISED
from tests.conformance.quantised import Cell as QuantisedCell

__all__ = [
    "DECLARED",
    "Declared",
    "Instance",
    "candidates",
    "chosen",
    "every_cell",
    "every_quantised_cell",
    "factors",
    "name_of",
    "row",
]

Test = TypeVar("Test", bound=Callable[..., None])
Values = Sequence[Any] | Mapping[str, Any]


class AnyCell(Protocol):
    """A cell in plain floats, or a quantised one."""

    @property
    def id(self) -> str: ...

    @property
    def factors(self) -> tuple[str, str, str, str]:
        """Method, kind, bias and storage."""

    @property
    def cost(self) -> int:
        """About how many times as long as on others a test takes on it."""


class Instance(NamedTuple):
    """A test with its arguments. reason: why EXCEPTIONS leaves it out; None where it runs."""

    test: str
    id: str
    arguments: tuple[Any, ...]
    reason: str | None


@final
@dataclass(frozen=True)
class Declared:
    """What a test runs on: each cell (with the reason why it is left out, if it is), each value of each other argument.

    values: argument -> {what stands in the test's id: value}. cost: about how many times as long as most it takes.
    quick: False where no part of it runs in `make test`.
    """

    test: str
    cells: Sequence[tuple[AnyCell, str | None]]
    values: Mapping[str, Mapping[str, Any]]
    cost: int
    quick: bool

    def instances(self) -> Iterator[Instance]:
        """All of them, in the order of their ids."""
        for values in itertools.product(*(given.items() for given in self.values.values())):
            words = "".join(f"{word}-" for word, _ in values)
            others = tuple(value for _, value in values)
            for cell, reason in self.cells:
                yield Instance(self.test, words + cell.id, (cell, *others), reason)

    def parametrized(self, whole: bool) -> tuple[list[str], list[Any]]:
        """The names of the arguments, and pytest's parameters: the ``whole`` product, or what is in `make test`."""
        parameters = []
        for one in self.instances():
            full = (one.test, one.id) not in chosen()
            if full and self.quick and not whole:  # pytest skips, and tells of, a test without any parameters
                continue
            marks = [pytest.mark.full] if full else []
            if one.reason is not None:
                marks.append(pytest.mark.skip(reason=one.reason))
            parameters.append(pytest.param(*one.arguments, id=one.id, marks=marks))
        return ["cell", *self.values], parameters


DECLARED: dict[str, Declared] = {}  # by name_of the test


def name_of(test: Callable[..., None]) -> str:
    """``test_forward.test_the_start_is_the_base``."""
    return f"{test.__module__.rpartition('.')[2]}.{test.__name__}"


def every_cell(
    label: str, cells: Iterable[Cell] = CELLS, *, cost: int = 1, quick: bool = True, **values: Values
) -> Callable[[Test], Test]:
    """Run a test on cells, with each of ``values`` of its other arguments.

    label: what EXCEPTIONS calls the test; the cells that it names are skipped with their reason. For the rest see
    :class:`Declared`.
    """
    # What is left out whole has no test at all: test_tables.py holds that it is refused.
    run = [cell for cell in cells if _reason(cell.case.name, cell.kind, "*") is None]
    return _declare([(cell, _reason(cell.case.name, cell.kind, label)) for cell in run], values, cost, quick)


@functools.cache
def _reason(method: str, kind: str, label: str) -> str | None:
    """Cell.reason, asked once for all cells of a method and a kind."""
    return excepted(method, kind, "dense", label)


def every_quantised_cell(
    cells: Iterable[QuantisedCell] = QUANTISED, *, cost: int = 1, **values: Values
) -> Callable[[Test], Test]:
    """The same on quantised layers."""
    return _declare([(cell, None) for cell in cells], values, cost, True)


def _declare(
    cells: Sequence[tuple[AnyCell, str | None]], values: Mapping[str, Values], cost: int, quick: bool
) -> Callable[[Test], Test]:
    named = {
        name: given if isinstance(given, Mapping) else {str(value): value for value in given}
        for name, given in values.items()
    }

    def declare(test: Test) -> Test:
        name = name_of(test)
        DECLARED[name] = Declared(name, cells, named, cost, quick)
        return test

    return declare


@functools.cache
def _all() -> tuple[Declared, ...]:
    """Of every test of this folder, imported for it or not yet."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.conformance.{path.stem}")
    return tuple(DECLARED[name] for name in sorted(DECLARED))


@functools.cache
def factors() -> tuple[str, ...]:
    """The names of the factors, in the order of a row."""
    others = sorted({name for declared in _all() for name in declared.values})
    return ("test", "method", "kind", "bias", "storage", *others)


@functools.cache
def candidates() -> tuple[Instance, ...]:
    """What the array is chosen of: all that runs, but for tests of which nothing is in `make test`."""
    return tuple(one for declared in _all() if declared.quick for one in declared.instances() if one.reason is None)


def row(one: Instance) -> Row:
    """The values of the factors."""
    cell, *others = one.arguments
    given = dict(zip(DECLARED[one.test].values, map(str, others), strict=True))
    return (one.test, *cell.factors, *(given.get(name) for name in factors()[5:]))


@functools.cache
def chosen() -> frozenset[tuple[str, str]]:
    """(test, id) of what is in `make test`."""
    found = candidates()
    costs = [DECLARED[one.test].cost * one.arguments[0].cost for one in found]
    places = covering([row(one) for one in found], costs)
    return frozenset((found[place].test, found[place].id) for place in places)
