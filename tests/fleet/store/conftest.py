"""What the tests of stores share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kilotune.fleet.store import AdapterStore
from tests.support.store_support import KINDS, Opener, new_url, opener


@pytest.fixture(params=KINDS)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    """Opens the test's store, as often as one likes; on SQLite and on PostgreSQL."""
    stores: list[AdapterStore] = []
    yield opener(new_url(request.param, request, tmp_path), stores)
    for store in stores:
        store.close()
