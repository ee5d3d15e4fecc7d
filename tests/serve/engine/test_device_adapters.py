"""The adapters of a model's device: which of them may share a bank, and that each runs with its own frozen numbers."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import VeraConfig, get_peft_model
from kilotune.adapter_files.reading import open_adapter
from kilotune.fleet import wrap
from kilotune.serve.engine import device_adapters
from kilotune.serve.engine.device_adapters import Residents
from tests.support.models import Nested, randomize

X = torch.linspace(-1, 1, 24).view(4, 6)
# Options of which PEFT lacks most, and which decide what an adapter computes.
VERAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "in the file": {"save_projection": True},
    "by shape": {"sharing": "shape"},
    "PEFT's": {"generator": "peft"},
    "PEFT's, in the file": {"generator": "peft", "save_projection": True},
    "lengths": {"use_dora": True},
}


@pytest.mark.parametrize("first, second", list(permutations(VERAS, 2)))
def test_who_came_first_decides_nothing(first: str, second: str, tmp_path: Path) -> None:
    """All of them have PEFT's options alike. What brings its matrices along ran with those of the first."""
    residents = Residents(
        wrap(Nested().eval()),
        slots=2,
        forms=4,
        whole=4,
        dtype=torch.float32,
        max_norm=1e9,
        max_rank=64,
        form_bytes=10**8,
    )
    for name in (first, second):
        model = get_peft_model(Nested(), VeraConfig(r=4, target_modules=["up", "stem"], **VERAS[name])).eval()
        randomize(model)
        model.save_pretrained(tmp_path / name)
        held = residents.hold(residents.row(name, open_adapter(tmp_path / name), name))
        with torch.no_grad(), residents.model.running(residents.route([(held, len(X))], tokens=False)):
            torch.testing.assert_close(residents.model(X), model(X), rtol=0, atol=1e-5)


def test_what_is_remembered_of_forms_that_no_bank_takes_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config may have megabytes; each put of another one left it all in memory for good, refused ones too."""
    monkeypatch.setattr(device_adapters, "UNBANKED", 3)
    residents = Residents(
        wrap(Nested().eval()),
        slots=2,
        forms=4,
        whole=4,
        dtype=torch.float32,
        max_norm=1e9,
        max_rank=64,
        form_bytes=10**8,
    )
    for i in range(5):
        excluded = [f"nothing{i}", *(f"{j:0100}" for j in range(100))]
        config = VeraConfig(r=4, target_modules=["stem"], modules_to_save=["head"], exclude_modules=excluded)
        get_peft_model(Nested(), config).save_pretrained(tmp_path / str(i))
        residents.check(open_adapter(tmp_path / str(i)), "mine")
    assert len(residents._unbanked) == 3
    assert sum(map(len, residents._unbanked)) < 300
