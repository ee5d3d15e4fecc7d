"""docs/deploy.md has the table that scripts/capacity.py makes."""

from __future__ import annotations

import runpy

import pytest

from tests.support.paths import ROOT


@pytest.mark.heavy
def test_the_page_has_the_scripts_table() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "capacity.py"))
    lines = made["table"](["llama-3.1-8b"]).splitlines()
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in page if line.startswith("| llama-3.1-8b")] == lines[2:]
    assert {line.split("|")[1].strip() for line in page if line.startswith("| llama")} == set(made["BASES"])


@pytest.mark.heavy
def test_one_row_by_hand() -> None:
    """Query and value of 32 layers: d is r long, b 4096 and 1024."""
    made = runpy.run_path(str(ROOT / "scripts" / "capacity.py"))
    numbers = 32 * (2 * 256 + 4096 + 1024)
    row = next(row for row in made["rows"](["llama-3.1-8b"]) if row[1:3] == ("query and value", "VeRA r 256"))
    assert row[3] == 2 * numbers / 1e6
    weights = 2 * 8_030_261_248
    assert row[4] == (80 * 10**9 - 16 * 10**9 - weights) // (2 * numbers)
