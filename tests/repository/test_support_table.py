"""docs/support.md says what the conformance tests run, and has a tick or a reason in every cell."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from kilotune import get_config, get_peft_model
from kilotune.methods import METHODS, PRESETS
from kilotune.plan import load_base
from tests.conformance import cells, quantised
from tests.support.paths import ROOT

REASONS = (
    "not linear: ",
    "no bias slot: ",
    "no output to add to: ",
    "no input to read: ",
    "a GPU: ",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "scripts" / "support_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(lines: list[str]) -> dict[str, list[str]]:
    """First column -> the others."""
    table = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in table}


def test_the_page_is_what_the_conformance_tests_say(script: ModuleType) -> None:
    page = ROOT / "docs" / "support.md"
    assert page.read_text(encoding="utf-8") == script.render(), "run: python scripts/support_table.py"


def test_every_cell_has_a_tick_or_a_reason_that_the_library_gives(script: ModuleType) -> None:
    for lines in (script.plain(cells), script.quantised(cells, quantised)):
        table = rows(lines)
        legend = {match.group(1): match.group(2) for line in lines if (match := re.match(r"- (\w): (.*)", line))}
        assert {f"`{name}`" for name in (*METHODS, *PRESETS)} <= set(table)
        for method, marks in table.items():
            for mark in marks if method else []:
                assert mark in ("✓", "no") or mark in legend, f"{method}: {mark}"
        for reason in legend.values():
            assert reason.startswith(REASONS), reason


def test_every_method_that_is_linear_runs_in_every_storage(script: ModuleType) -> None:
    linear = {name for name in METHODS if any(c.fits for c in cells.ALL if c.case.name == name and c.kind == "linear")}
    assert linear == set(METHODS)
    table = rows(script.quantised(cells, quantised))
    ran = len(quantised.STORAGE_SCHEMES)
    assert all(table[f"`{name}`"][:ran] == ["✓"] * ran for name in linear)


def test_a_tick_goes_when_its_cells_do(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = script.plain(cells)
    monkeypatch.setitem(cells.EXCEPTIONS, ("lora", "linear", "dense", "*"), "not linear: planted by this test")
    after = script.plain(cells)
    assert rows(before)["`lora`"][0] == "✓"
    assert rows(after)["`lora`"][0] != "✓"
    assert any("planted by this test" in line for line in after)


def test_the_table_of_methods_counts_right() -> None:
    """docs/adapters.md, "Which method to take": every name, and its numbers on Llama-3.2-3B."""
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    lines = page.split("## Which method to take")[1].split("\n## ")[0].splitlines()
    table = rows([line for line in lines if line.startswith("| ")])
    named = {name.strip("`"): marks for name, marks in table.items() if name.startswith("`")}
    assert set(named) == {*METHODS, *PRESETS} - {"bottleneck"}  # three presets stand for it
    for name, (options, _, numbers, *_) in named.items():
        config = get_config(name, **eval(f"dict({options})"))
        model = get_peft_model(load_base("llama-3.2-3b").model, config)
        assert f"{model.get_nb_trainable_parameters()[0]:,}" == numbers, name
