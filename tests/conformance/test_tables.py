"""Whatever is listed in a registry has what the conformance tests need to know of it."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.cells import (
    ALL,
    CELLS,
    COUNTS,
    EXCEPTIONS,
    FORMULAS,
    KIND_CASES,
    METHOD_CASES,
    ON_OUTPUT,
    REFUSED,
    STORAGE_CASES,
    Cell,
    philox,
    unit_matrix,
)
from kilotune import TargetError, UnsupportedError, get_peft_model
from kilotune.deltas import Full, LowRank, Rescale, Residual, Shift
from kilotune.kinds import KINDS, kind_of
from kilotune.methods import METHODS
from kilotune.storage import STORAGES, storage_of


def test_every_listed_part_is_in_the_tables() -> None:
    kinds, storages = [kind.name for kind in KINDS], [storage.name for storage in STORAGES]
    assert set(METHODS) == set(METHOD_CASES) == set(COUNTS) == {*FORMULAS, *ON_OUTPUT}
    assert set(kinds) == set(KIND_CASES)
    assert set(storages) == set(STORAGE_CASES)
    assert len(set(kinds)) == len(kinds)
    assert len(set(storages)) == len(storages)
    assert {cell.case.name for cell in CELLS} == set(METHODS)
    assert {cell.kind.name for cell in CELLS} == set(kinds)
    assert {method.makes for method in METHODS.values()} == {Full, LowRank, Rescale, Residual, Shift}
    assert len({cell.id for cell in ALL}) == len(ALL)


def test_exceptions_name_parts_that_exist_and_say_why() -> None:
    for (method, kind, storage, _), reason in EXCEPTIONS.items():
        assert method in METHODS
        assert kind in KIND_CASES
        assert storage in STORAGE_CASES
        assert len(reason) > 20


@pytest.mark.parametrize("cell", ALL, ids=lambda cell: cell.id)
def test_the_example_is_of_its_kind_and_storage(cell: Cell) -> None:
    layer = cell.base().get_submodule("layer")
    assert kind_of(layer) is cell.kind
    assert storage_of(layer) is cell.storage


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.id)
def test_what_a_kind_does_not_offer_is_refused_with_the_reason(cell: Cell) -> None:
    base = cell.base()
    with pytest.raises((TargetError, UnsupportedError), match="is not a kind of layer that this method can adapt"):
        get_peft_model(base, cell.config())
    assert type(base.get_submodule("layer")) is type(cell.base().get_submodule("layer"))


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
