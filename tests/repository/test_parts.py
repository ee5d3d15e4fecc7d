"""Parts of the tests: each test is in one of them."""

from __future__ import annotations

import pytest

from tests.support.parts import in_part, part_of


def test_each_test_is_in_one_part() -> None:
    names = [f"tests/a.py::test_b[{i}]" for i in range(1000)]
    parts = [[name for name in names if in_part(name, which, 4)] for which in range(1, 5)]
    assert sorted(name for own in parts for name in own) == sorted(names)
    assert min(map(len, parts)) > 200


def test_a_part_is_two_numbers() -> None:
    assert part_of("2/4") == (2, 4)
    for text in ("0/4", "5/4", "1", "a/b", "1/0", "-1/4", ""):
        with pytest.raises(ValueError, match="expected K/N"):
            part_of(text)
