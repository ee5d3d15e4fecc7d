"""256 users are trained together on real data, stored, and routed by another process: each is what its twin is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kilotune.fleet import AdapterBank, open_store, wrap
from tests.support import fleet_done
from tests.support.fleet_support import alone
from tests.support.paths import ROOT, SUPPORT

TWINS = (0, 77, 130, 255)


@pytest.mark.full
def test_256_users_trained_stored_and_routed_are_what_their_twins_are(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SUPPORT / "fleet_done.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=SUPPORT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    users = fleet_done.users()
    base = fleet_done.base()
    with open_store(f"sqlite:///{tmp_path / 'adapters.db'}", base=base, read_only=True) as store:
        assert sorted(version.name for version in store.ls(versions=True)) == sorted(user.name for user in users)
        bank = AdapterBank(wrap(base), fleet_done.CONFIG, slots=100, load=lambda name: store.get(name).file())
        picked = [users[i] for i in (*range(3, 256, 4), *TWINS)]
        names: list[str | None] = [None, *(user.name for user in picked)]
        batch = fleet_done.collate([users[5].data[2]] * len(names))
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            routed = bank.model(**inputs, adapter_names=names).logits
            plain = fleet_done.base()(**{key: value[:1] for key, value in inputs.items()}).logits[0]
    assert torch.equal(routed[0], plain) or torch.allclose(routed[0], plain, atol=1e-6)
    for place, i in enumerate(TWINS, len(names) - len(TWINS)):
        twin, _ = alone(fleet_done.base(), fleet_done.CONFIG, users[i], fleet_done.SETTINGS, collate_rows)
        with torch.no_grad():
            expected = twin(**{key: value[:1] for key, value in inputs.items()}).logits[0]
        error = (routed[place] - expected).abs().max()
        assert error < 1e-4, users[i].name
        assert (expected - plain).abs().max() > 100 * error, "it learned nothing"
        assert (routed[place] - routed[place - 1]).abs().max() > 100 * error, "two users are the same"


def collate_rows(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return fleet_done.collate(rows)
