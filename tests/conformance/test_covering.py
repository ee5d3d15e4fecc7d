"""`make test` runs a covering array of the conformance tests: each two values that meet in any test meet in it.

The values are read off the cells and counted one by one here, with nothing of covering.py.
"""

from __future__ import annotations

import collections
import importlib
import inspect
import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conformance.cells import CELLS, METHOD_CASES, Cell
from tests.conformance.conftest import pytest_generate_tests
from tests.conformance.covering import Row, covering
from tests.conformance.declared import DECLARED, Instance, candidates, chosen
from tests.conformance.kind_cases import KIND_CASES
from tests.conformance.quantised import STORAGE_SCHEMES

Pair = tuple[tuple[str, ...], tuple[str, ...]]


def values(one: Instance) -> list[tuple[str, ...]]:
    """(factor, value) for all that a test is made of, sorted."""
    cell, *others = one.arguments
    storage = ("dense",) if isinstance(cell, Cell) else (cell.scheme.storage, cell.scheme.name)
    kind = cell.kind if isinstance(cell, Cell) else "linear"
    arguments = zip(list(DECLARED[one.test].values), map(str, others), strict=True)
    case = ("method", cell.case.name, str(cell.case.options))
    return sorted(
        [("test", one.test), case, ("kind", kind), ("bias", str(cell.bias)), ("storage", *storage), *arguments]
    )


def pairs(one: Instance) -> list[Pair]:
    return list(itertools.combinations(values(one), 2))


@pytest.fixture(scope="module")
def wanted() -> set[Pair]:
    """Each pair of values that meets in any test that can run."""
    return {pair for one in candidates() for pair in pairs(one)}


@pytest.fixture(scope="module")
def quick() -> list[Instance]:
    return [one for one in candidates() if (one.test, one.id) in chosen()]


def missing(wanted: set[Pair], quick: list[Instance]) -> set[Pair]:
    return wanted - {pair for one in quick for pair in pairs(one)}


def test_each_two_values_that_meet_anywhere_meet_in_make_test(wanted: set[Pair], quick: list[Instance]) -> None:
    assert len(quick) == len(chosen()) < len(candidates()) / 20
    assert not missing(wanted, quick)
    assert not any(one.reason for one in quick)  # a test that is skipped covers nothing


def test_a_hole_in_the_array_is_seen(wanted: set[Pair], quick: list[Instance]) -> None:
    times = collections.Counter(pair for one in quick for pair in pairs(one))
    needed = next(one for one in quick if any(times[pair] == 1 for pair in pairs(one)))
    assert missing(wanted, [one for one in quick if one is not needed])


# Of which nothing is in `make test`: compilers, beyond each method's first configuration.
SLOW = {"test_lifecycle.test_inductor_compiles_it", "test_forward.test_so_it_does_in_every_other_configuration"}


def test_nothing_is_without_a_test_in_make_test(quick: list[Instance]) -> None:
    """As the tables say it: test functions, methods with each of their options, kinds, storages."""
    ran = {value for one in quick for value in values(one)}
    for path in Path(__file__).parent.glob("test_*.py"):
        module = importlib.import_module(f"tests.conformance.{path.stem}")
        for name, test in inspect.getmembers(module, inspect.isfunction):
            own = "cell" in inspect.signature(test).parameters and name.startswith("test_")
            plain = any(mark.name == "parametrize" for mark in getattr(test, "pytestmark", ()))  # all of it runs
            if own and not plain and f"{path.stem}.{name}" not in SLOW:
                assert ("test", f"{path.stem}.{name}") in ran
    assert {("method", case.name, str(case.options)) for cases in METHOD_CASES.values() for case in cases} <= ran
    named = {f"{kind}:{case.name}" if case.name else kind for kind, cases in KIND_CASES.items() for case in cases}
    assert {("kind", name) for name in named} <= ran
    assert {("storage", scheme.storage, scheme.name) for scheme in STORAGE_SCHEMES} | {("storage", "dense")} <= ran
    assert {("dtype", f"torch.{name}") for name in ("float64", "float32", "bfloat16", "float16")} <= ran
    assert {("bias", "True"), ("bias", "False")} <= ran


def made(name: str, expression: str) -> dict[str, Any]:
    """Id -> pytest's parameters of a test, where pytest is run with ``-m expression``."""
    found: dict[str, Any] = {}

    def parametrize(names: list[str], parameters: list[Any]) -> None:
        assert names == ["cell", *DECLARED[name].values]
        found.update({parameter.id: parameter for parameter in parameters})
        assert len(found) == len(parameters)

    module, _, function = name.partition(".")
    test = getattr(importlib.import_module(f"tests.conformance.{module}"), function)
    config = SimpleNamespace(option=SimpleNamespace(markexpr=expression))
    pytest_generate_tests(SimpleNamespace(function=test, config=config, parametrize=parametrize))  # type: ignore[arg-type]
    return found


def test_pytest_gets_the_array_or_the_whole_product() -> None:
    """The same ids in both, and what is marked full in the product is what the array leaves out."""
    for name in {test for test, _ in chosen()}:
        whole, quick = made(name, ""), made(name, "not full")
        assert list(whole) == [one.id for one in DECLARED[name].instances()]
        assert list(quick) == [key for key, one in whole.items() if "full" not in {mark.name for mark in one.marks}]
        assert all(whole[key].values == one.values and not one.marks for key, one in quick.items())
        assert {*quick} == {key for test, key in chosen() if test == name}
    assert list(made(name, "full")) == list(made(name, "full and not gpu")) == list(whole)


def test_what_is_slow_as_a_whole_is_marked_so() -> None:
    for name in DECLARED.keys() - {test for test, _ in chosen()}:
        assert name in SLOW
        found = made(name, "not full")
        assert found
        assert all("full" in {mark.name for mark in one.marks} for one in found.values())


def test_the_choice_is_of_the_rows_and_not_of_their_order_and_prefers_cheap_ones() -> None:
    rows: list[Row] = [(a, b, c) for a in "abc" for b in "de" for c in ("f", "g", None)]
    costs = [9 if row[2] == "f" else 1 for row in rows]
    first = {rows[place] for place in covering(rows, costs)}
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {shuffled[p] for p in covering(shuffled, [9 if row[2] == "f" else 1 for row in shuffled])} == first
    met = {pair for row in first for pair in itertools.combinations(enumerate(row), 2)}
    assert {
        p for row in rows for p in itertools.combinations(enumerate(row), 2) if None not in (p[0][1], p[1][1])
    } <= met
    assert sum(row[2] == "f" for row in first) == 3  # as many as it takes to meet a, b and c


def test_the_cells_of_the_tables_are_the_ones_that_run(quick: list[Instance]) -> None:
    left_out = {cell.id for cell in CELLS if cell.reason("*") is not None}
    assert not left_out & {one.arguments[0].id for one in candidates()}
