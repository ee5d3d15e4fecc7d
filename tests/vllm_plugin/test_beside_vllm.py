"""docs/beside-vllm.md names every option that the requests of this vLLM have, and no other."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="the tests of the plugin run in .venv-vllm: make test-vllm")

ROOT = Path(__file__).resolve().parents[2]


def test_the_options_are_those_of_this_vllm() -> None:
    spec = importlib.util.spec_from_file_location("vllm_comparison", ROOT / "scripts" / "vllm_comparison.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    found = script.of_vllm(Path(package.origin).parent)
    page = script.of_page(script.PAGE.read_text(encoding="utf-8"))
    assert {name: sorted(own) for name, own in found.items()} == {name: sorted(own) for name, own in page.items()}
