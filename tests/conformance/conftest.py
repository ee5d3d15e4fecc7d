"""While a conformance test runs, the toy methods are in the registry beside the real ones."""

from __future__ import annotations

import pytest

from kilotune.methods import METHODS
from tests.conformance.declared import DECLARED, name_of
from tests.conformance.toys import TOYS


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, toy in TOYS.items():
        monkeypatch.setitem(METHODS, name, toy)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is marked full is not even made where no test marked so can be wanted: that takes seconds a process."""
    if (declared := DECLARED.get(name_of(metafunc.function))) is not None:
        names, parameters = declared.parametrized(whole="not full" not in metafunc.config.option.markexpr)
        metafunc.parametrize(names, parameters)
