"""A rescaling adapter beside others in one layer: it scales the base's map, and only that."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kilotune import LoraConfig, PeftModel, UnsupportedError, get_peft_model
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


def by_hand(model: PeftModel, cols: bool) -> torch.Tensor:
    """The base, and the change that each adapter makes of it, written out."""
    base = model.adapted_layers()["0"].base_layer
    low, rows = dict(model.adapter_parameters("low")), dict(model.adapter_parameters("rows"))
    scale_in = rows["0.cols"].double() if cols else torch.ones(6, dtype=torch.float64)
    scaled = rows["0.rows"].double()[:, None] * base.weight * scale_in
    weight = low["0.lora_B"].double() @ low["0.lora_A"].double() + scaled
    return X @ weight.T + low["0.bias"].double()


@pytest.mark.parametrize("cols", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_a_rescaling_beside_an_additive_adapter(cols: bool, merged: bool) -> None:
    model = model_with(cols=cols)
    expected = by_hand(model, cols)
    model.set_adapter(["low", "rows"])
    if merged:  # one in the weights, the other run beside them
        model.merge_adapter(["low"])
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


def test_merging_minds_the_adapters_that_stay_active() -> None:
    model = model_with()
    model.add_adapter("more", RescaleConfig(target_modules=["0"], rows=True))
    model.set_adapter("rows")
    with pytest.raises(UnsupportedError, match="'rows' and 'more' are both not additive|'more' and 'rows'"):
        model.merge_adapter(["more"])
    assert model.merged_adapters == []


def test_what_is_made_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]))
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_adapter()
    model.unmerge_adapter()
    model(X.float()).sum().backward()
    assert all(parameter.grad is not None for _, parameter in model.adapter_parameters())
