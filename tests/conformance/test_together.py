"""A rescaling adapter beside others in one layer: it scales what is there before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kilotune import LoraConfig, PeftModel, get_peft_model
from tests.conformance.toys import RescaleConfig

X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)


def model_with(**rescale: object) -> PeftModel:
    """Adapters "low" (LoRA with a trained bias) and "rows" (a rescaling), with values of some size in both."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], bias="lora_only")
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)).double(), config, "low")
    model.add_adapter("rows", RescaleConfig(target_modules=["0"], rows=True, **rescale))
    with torch.no_grad():
        for name in ("low", "rows"):
            for parameter in dict(model.adapter_parameters(name)).values():
                parameter.copy_(torch.randn_like(parameter))
    return model


def by_hand(model: PeftModel, cols: bool, rows_last: bool) -> torch.Tensor:
    """The base, and the change that each adapter makes of it, written out."""
    base = model.adapted_layers()["0"].base_layer
    low, rows = dict(model.adapter_parameters("low")), dict(model.adapter_parameters("rows"))
    scale_in = rows["0.cols"].double() if cols else torch.ones(6, dtype=torch.float64)
    scaled = rows["0.rows"].double()[:, None] * base.weight * scale_in
    weight = low["0.lora_B"].double() @ low["0.lora_A"].double()
    if rows_last:  # what was added before is scaled too
        weight = rows["0.rows"].double()[:, None] * weight * scale_in
    return X @ (weight + scaled).T + low["0.bias"].double()


@pytest.mark.parametrize("cols", [False, True])
@pytest.mark.parametrize("merged", [[], ["low"], ["rows"], ["low", "rows"]])
@pytest.mark.parametrize("order", [["low", "rows"], ["rows", "low"]])
def test_a_rescaling_beside_an_additive_adapter(cols: bool, merged: list[str], order: list[str]) -> None:
    model = model_with(cols=cols)
    expected = by_hand(model, cols, rows_last=order[-1] == "rows")
    model.set_adapter(order)
    if merged:  # some in the weights, the others run beside them
        model.merge_adapter(merged)
    torch.testing.assert_close(model(X), expected)


def test_dropout_falls_on_the_change_and_not_on_the_base() -> None:
    model = model_with(cols=True)
    model.set_adapter("rows")
    model.train()
    layer = model.adapted_layers()["0"]
    slot = layer.slot("rows")
    assert slot is not None
    slot.drop = lambda x: torch.full_like(x, torch.nan)  # type: ignore[method-assign]
    assert torch.isfinite(model(X)).all()


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_adapter()
    model.unmerge_adapter()
    model(X.float()).sum().backward()
    assert all(parameter.grad is not None for _, parameter in model.adapter_parameters())
