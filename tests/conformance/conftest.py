"""While a conformance test runs, the toy methods are in the registry beside the real ones."""

from __future__ import annotations

import pytest
from tests.conformance.toys import TOYS

from kilotune.methods import METHODS


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, toy in TOYS.items():
        monkeypatch.setitem(METHODS, name, toy)
