"""What tests of learning share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.learning_support import Learning, learning


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learning]:
    """A namespace's users, over one base that learns and answers."""
    with learning(tmp_path_factory.mktemp("school")) as made:
        yield made
