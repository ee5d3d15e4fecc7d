"""LoRA's starts against PEFT, live: the numbers they start with, outputs, gradients, and files both ways."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

import kilotune
from tests.peft_parity.files import check_outputs, peft_load
from tests.peft_parity.oracle import assert_close, base, peft_parameters, quiet

ALL = "all-linear"


def test_orthogonal_is_as_large_as_pefts() -> None:
    """Not the same numbers, which are drawn in another order, but of the same size, with a product of zero."""
    options = {"r": 4, "target_modules": ["first"], "init_lora_weights": "orthogonal"}
    with quiet():
        theirs = peft.get_peft_model(base("mlp"), peft.LoraConfig(**options))
    own = peft_parameters(theirs)
    ours = dict(kilotune.get_peft_model(base("mlp"), kilotune.LoraConfig(**options)).adapter_parameters())
    for mine in (own, ours):
        a, b = mine["first.lora_A"].detach(), mine["first.lora_B"].detach()
        assert float((b @ a).abs().max()) < 1e-6
        assert float(a.std()) > 0.03
        assert float(b.std()) > 0.03


def test_orthogonal_files_go_both_ways(tmp_path: Path) -> None:
    options = {"r": 4, "target_modules": ALL, "init_lora_weights": "orthogonal"}
    ours = kilotune.get_peft_model(base("mlp"), kilotune.LoraConfig(**options))
    with torch.no_grad():
        for _, parameter in ours.adapter_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft_load(tmp_path / "ours", base("mlp"))
    check_outputs(theirs, ours)
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base("mlp"), tmp_path / "theirs")
    check_outputs(loaded, theirs)
    assert loaded.peft_config["default"].init_lora_weights == "orthogonal"
    with torch.no_grad(), loaded.disable_adapter():
        plain = loaded(torch.ones(1, 12))
    assert_close(plain, base("mlp")(torch.ones(1, 12)).detach(), "without the adapter", 0.0)
