"""What kilotune wrote once is read for ever: golden folders of our own (tests/golden_ours/make_golden.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kilotune import PeftModel
from tests.support.paths import ROOT

HERE = ROOT / "tests" / "golden_ours"
MANIFEST: dict[str, Any] = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden_ours", HERE / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(script: ModuleType, folder: Path, entry: dict[str, Any]) -> None:
    base = script.base(entry["base"])
    plain = torch.tensor(script.outputs(base))
    expected = torch.tensor(entry["output"])
    found = torch.tensor(script.outputs(PeftModel.from_pretrained(base, folder)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert float((plain - expected).abs().max()) > 1e-2 * float(expected.abs().max())


@pytest.mark.parametrize("case", MANIFEST)
def test_the_outputs_are_those_of_then(case: str, script: ModuleType) -> None:
    check(script, HERE / case, MANIFEST[case])


@pytest.mark.parametrize("case", MANIFEST)
def test_what_is_written_now_says_the_same(case: str, script: ModuleType, tmp_path: Path) -> None:
    entry = script.make(case, tmp_path)
    assert entry["output"] == pytest.approx(MANIFEST[case]["output"], rel=1e-4, abs=1e-5)
    check(script, tmp_path / case, MANIFEST[case])


def test_all_folders_are_listed(script: ModuleType) -> None:
    assert {path.parent.name for path in HERE.glob("*/adapter_config.json")} == set(MANIFEST) == set(script.CASES)
