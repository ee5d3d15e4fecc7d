"""Whatever is listed in a registry has what the conformance tests need to know of it."""

from __future__ import annotations

import fnmatch

import numpy as np
import pytest

from kilotune import KilotuneError, TargetError, UnsupportedError, get_peft_model
from kilotune.deltas import Full, LowRank, Rescale, Residual, Shift
from kilotune.kinds import KINDS, kind_of
from kilotune.methods import METHODS, PRESETS
from kilotune.storage import STORAGES
from tests.conformance.cells import (
    ALL,
    CELLS,
    EXCEPTIONS,
    FORMULAS,
    KIND_CASES,
    METHOD_CASES,
    ON_OUTPUT,
    REFUSED,
    Cell,
)
from tests.conformance.references._numbers import philox, unit_matrix
from tests.support.models import bits


def test_every_listed_part_is_in_the_tables() -> None:
    """Every method, every preset, every kind; the storages are those of quantised.py."""
    methods = {*METHODS, *PRESETS}
    assert methods == set(METHOD_CASES)
    kinds, storages = [kind.name for kind in KINDS], [(storage.name, storage.weight_name) for storage in STORAGES]
    assert set(kinds) <= set(KIND_CASES)
    assert {kind for kind, cases in KIND_CASES.items() if cases[0].kind is None} <= set(kinds)
    assert len(set(kinds)) == len(kinds)
    assert len(set(storages)) == len(storages)
    assert {cell.case.name for cell in CELLS} == methods
    assert {cell.kind.partition(":")[0] for cell in CELLS} == set(KIND_CASES)
    assert {cell.makes for cell in CELLS} == {Full, LowRank, Rescale, Residual, Shift}
    assert len({cell.id for cell in ALL}) == len(ALL)
    assert all(len({case.name for case in cases}) == len(cases) for cases in KIND_CASES.values())


def test_every_method_has_a_formula_that_is_written_again() -> None:
    missing = sorted(set(METHOD_CASES) - {*FORMULAS, *ON_OUTPUT})
    assert not missing, f"write tests/conformance/references/<method>.py with CASES and FORMULAS for {missing}"
    assert set(METHOD_CASES) == {*FORMULAS, *ON_OUTPUT}


def test_exceptions_leave_something_out_and_say_why() -> None:
    kinds = [cell.kind for cell in ALL]
    for (method, kind, _, _), reason in EXCEPTIONS.items():
        assert fnmatch.filter(METHOD_CASES, method), method
        assert fnmatch.filter(kinds, kind), kind
        assert len(reason) > 20


@pytest.mark.parametrize(
    "cell", {(c.kind, c.bias): c for c in ALL if c.kind_case.kind is None}.values(), ids=lambda cell: cell.id
)
def test_the_example_is_of_its_kind(cell: Cell) -> None:
    assert kind_of(cell.base().get_submodule("layer")) is cell.part


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.id)
def test_what_a_kind_does_not_offer_is_refused_with_the_reason(cell: Cell) -> None:
    base = cell.base()
    before = bits(base)
    with pytest.raises((TargetError, UnsupportedError)) as caught:
        get_peft_model(base, cell.config())
    lacking = cell.makes.needs - (cell.part.offers - cell.kind_case.lacks)
    reasons = [
        *(getattr(cell.part, "lacks", {}).get(need, "") for need in lacking),
        "is not a kind of layer that this method can adapt",
        "has no bias",
        "is a container",
        "is multiplied inside its module",
    ]
    assert any(reason and reason in str(caught.value) for reason in reasons), str(caught.value)
    assert bits(base) == before
    assert [type(m) for m in base.modules()] == [type(m) for m in cell.base().modules()]


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.reason("*") is not None], ids=lambda cell: cell.id)
def test_a_cell_left_out_whole_is_refused(cell: Cell) -> None:
    with pytest.raises(KilotuneError):
        get_peft_model(cell.base(), cell.config())


def test_the_independent_philox_gives_the_published_numbers() -> None:
    """Random123's known answers for a zero and a full counter, and the golden numbers of the definition."""
    assert philox((0, 0), (0, 0, 0, 0)) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )
    full = 2**64 - 1
    assert philox((full, full), (full, full, full, full)) == (
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    )
    first = np.float32([-0.93051624, -0.97690654, 0.22390044, -0.5169016, -0.2690375, -0.77714837])
    assert np.array_equal(unit_matrix(0, 0, 1, 6)[0], first)
    fourth = np.float32([0.14162624, 0.54344285, -0.49458194, 0.16172433])
    assert np.array_equal(unit_matrix(7, 1, 4, 4)[3], fourth)
