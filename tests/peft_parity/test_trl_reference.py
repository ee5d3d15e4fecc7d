"""A trained adapter that goes on under TRL: PEFT's model in the stock trainers, ours in those of with_reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kilotune import LoraConfig, PeftModel, get_peft_model
from tests.support.models import randomize, tiny_llama
from tests.support.preferences import options, trainer

pytest.importorskip("trl")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::FutureWarning:trl")


def losses(run: Any) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO"])
@pytest.mark.parametrize("new", [True, False], ids=["new", "goes on"])
def test_the_losses_of_a_training_are_those_of_peft(name: str, new: bool, tmp_path: Path) -> None:
    import trl

    start = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    if not new:
        randomize(start, scale=1.0)
    start.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    ours = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    given = {"max_steps": 4, "learning_rate": 0.05}
    expected = losses(getattr(trl, f"{name}Trainer")(model=theirs, **options(name, tmp_path, **given)))
    assert losses(trainer(name, ours, tmp_path, **given)) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert len(set(expected)) == 4
    learnt = {key: value for key, value in theirs.named_parameters() if ".default." in key}
    for key, value in ours.adapter_parameters():
        layer, _, own = key.rpartition(".")
        held = learnt[f"base_model.model.{layer}.{own}.default.weight"]
        torch.testing.assert_close(value, held, rtol=1e-2, atol=1e-4)
