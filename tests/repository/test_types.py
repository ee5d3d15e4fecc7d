"""What type checkers are told of the packages whose names are imported when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

RIGHT = """
import kilotune
from kilotune import LoraConfig, PeftModel, get_peft_model
from kilotune.fleet import AdapterBank
from kilotune.fleet.store import open_store
from kilotune.train import train

rank: int = LoraConfig(r=4).r
"""
WRONG = """
import kilotune
from kilotune import LoraConfg
from kilotune.fleet import AdapterBnak
from kilotune.fleet.store import open_stoer
from kilotune.train import trian

kilotune.get_peft_modle
rank: str = kilotune.LoraConfig(r=4).r
"""


@pytest.mark.heavy
def test_public_names_have_types_and_others_are_errors(tmp_path: Path) -> None:
    for name, text in (("right.py", RIGHT), ("wrong.py", WRONG)):
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, str(tmp_path / "right.py"), str(tmp_path / "wrong.py")], capture_output=True, text=True, cwd=ROOT
    )
    found = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line for line in found if "right.py" in line] == [], done.stdout
    for name in ("LoraConfg", "AdapterBnak", "open_stoer", "trian", "get_peft_modle"):
        assert [line for line in found if name in line], (name, done.stdout)
    assert [line for line in found if 'variable has type "str"' in line], done.stdout
