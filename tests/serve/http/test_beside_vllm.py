"""docs/beside-vllm.md says of our side what the code does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.http_support import serving
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_comparison", ROOT / "scripts" / "vllm_comparison.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_table_of_options_is_what_the_code_does(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    names = script.of_page(text)
    assert all(len(own) > 40 for own in names.values())
    assert script.page_of(text, names) == text
    lied = text.replace("| `tools` | served |", "| `tools` | 400 |")
    assert lied != text
    assert script.page_of(lied, script.of_page(lied)) == text


def test_no_route_is_left_out(script: ModuleType, tmp_path: Path) -> None:
    with serving(tmp_path) as running, running.client(running.keys["ann"]) as client:
        routes = client.get("/openapi.json").json()["paths"]
    page = script.PAGE.read_text(encoding="utf-8")
    missing = [route for route in routes if "{namespace}" not in route and f"`{route}`" not in page]
    assert missing == []
