"""The tests of the stock trainers once more, in a process in which PEFT is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

HERE = ROOT / "tests" / "train" / "trainer"
CENTRAL = "only_the_adapter or unilora or quantised or columns_labels"  # the others run in `make test-full`


@pytest.mark.heavy
def test_peft_is_absent_there() -> None:
    code = (
        "import tests.support.without_peft, transformers\n"
        "from transformers.utils import is_peft_available\n"
        "from accelerate.utils import is_peft_available as accelerates\n"
        "from importlib.metadata import version, PackageNotFoundError\n"
        "assert not is_peft_available() and not accelerates()\n"
        "assert version('accelerate')\n"
        "try:\n    version('peft')\nexcept PackageNotFoundError:\n    pass\nelse:\n    assert False\n"
        "try:\n    import peft\nexcept ModuleNotFoundError:\n    print('absent')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert run.stdout.strip() == "absent", run.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "some"),
    [
        pytest.param("test_stock_trainer.py", CENTRAL, id="trainer"),
        pytest.param("test_reference.py", "log_2", id="reference"),
        pytest.param("test_stock_trainer.py", "", id="trainer-all", marks=pytest.mark.full),
        pytest.param("test_sft_trainer.py", "", id="sft-all", marks=pytest.mark.full),
        pytest.param("test_reference.py", "", id="reference-all", marks=pytest.mark.full),
    ],
)
def test_it_holds_without_peft(file: str, some: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.support.without_peft", "-p", "no:cacheprovider"]
    command += ["-m", "not full"]
    command += [f"--basetemp={tmp_path / 'base'}", "-k", some, str(HERE / file)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout.splitlines()[-1]
    assert "skipped" not in run.stdout.splitlines()[-1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
