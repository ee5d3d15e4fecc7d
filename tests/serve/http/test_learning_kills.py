"""Fine-tuning jobs through kills at random moments, of one server and of one of two: none lost, none published twice,
and the same adapters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.job_kills import PLANTED
from tests.support.paths import ROOT


def killed(url: str, kills: int | str, seed: int, planted: str = "", seconds: float = 300.0) -> Any:
    """What comes of jobs whose servers are killed."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.job_kills", url, str(kills), str(seed)]
    found = subprocess.run(
        [*command, planted], capture_output=True, text=True, timeout=seconds, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.heavy
def test_jobs_outlive_five_kills(tmp_path: Path) -> None:
    found = killed(f"sqlite:///{tmp_path / 'a.db'}", 5, seed=1)
    assert found["faults"] == []
    assert found["kills"] == 5


@pytest.mark.full
@pytest.mark.timeout(1900)  # minutes of work, and more beside other work
def test_jobs_outlive_two_hundred_kills(tmp_path: Path) -> None:
    found = killed(f"sqlite:///{tmp_path / 'a.db'}", 200, seed=2, seconds=1800)
    assert found["faults"] == []
    assert found["kills"] == 200


@pytest.mark.full
@pytest.mark.parametrize(("planted", "told"), [(PLANTED[1], "it came to another adapter"), (PLANTED[2], "checkpoints")])
def test_what_is_planted_is_found(planted: str, told: str, tmp_path: Path) -> None:
    found = killed(f"sqlite:///{tmp_path / 'a.db'}", 60, seed=2, planted=planted)
    assert any(told in fault for fault in found["faults"]), found


@pytest.mark.full
def test_servers_share_jobs_and_take_over_from_one_that_dies(postgres: Any) -> None:
    found = killed(postgres.new_place(), "servers", seed=3)
    assert found["faults"] == []
    assert min(found["took"]) > 0, "both had jobs"
    assert found["over"] > 0, "what the dead one had"
