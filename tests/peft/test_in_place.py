"""kilotune.peft in the place of PEFT, in a process of its own: transformers' Trainer and its own adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.heavy
def test_a_script_for_peft_trains_saves_resumes_and_loads(tmp_path: Path) -> None:
    done = run("-m", "tests.peft.in_place_script", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trained"] == {"adapter": True, "base": False, "resumed": True, "read": True, "layers": 2}
    assert found["added"] == {"acts": True, "off": True, "two": True, "left": ["default"], "keys": 4, "read": True}


@pytest.mark.heavy
def test_it_comes_first_or_not_at_all() -> None:
    early = "import peft, kilotune.peft; kilotune.peft.install()"
    done = run("-W", "ignore", "-c", early)
    assert "UnsupportedError: kilotune.peft.install(): 'peft' is imported already" in done.stderr
    twice = "import kilotune.peft as p; p.install(); p.install(); import peft, peft.tuners.lora as l; "
    twice += "assert peft is p and l is p.tuners.lora; import peft.tuners.oft"
    done = run("-W", "ignore", "-c", twice)
    assert "ModuleNotFoundError: kilotune.peft has no module 'peft.tuners.oft'" in done.stderr


@pytest.mark.heavy
def test_without_it_a_trainer_is_told() -> None:
    code = (
        "import kilotune.peft as p; from tests.support.models import tiny_llama\n"
        "m = p.get_peft_model(tiny_llama(), p.LoraConfig(target_modules=['q_proj']))\n"
        "from transformers import Trainer, TrainingArguments\n"
        "Trainer(m, TrainingArguments('/nowhere', report_to=[], use_cpu=True))"
    )
    done = run("-W", "ignore", "-c", code)
    assert "call kilotune.peft.install() before transformers is imported" in done.stderr.replace("\n", " ")
