"""Several adapters in one layer, some of which rescale: in the order of activation, as in PEFT."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import kilotune
from tests.support.models import bits

X = torch.linspace(-1, 1, 30).view(5, 6)


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))


def both(configs: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """PEFT's model with random values in all adapters, and ours with the same from its files."""
    theirs: Any = None
    for name, config in configs.items():
        if theirs is None:
            theirs = peft.get_peft_model(base(), config, name)
        else:
            theirs.add_adapter(name, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora" in key or "ia3" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    first, *others = configs
    ours = kilotune.PeftModel.from_pretrained(base(), folder / first, adapter_name=first)
    for name in others:
        ours.load_adapter(folder / name, name)
    return theirs.eval(), ours.eval()


def dora(target: list[str], **options: Any) -> Any:
    return peft.LoraConfig(r=2, target_modules=target, use_dora=True, **options)


LOWRANK = {"x": dora(["0", "2"]), "y": dora(["0"], lora_alpha=3), "z": peft.LoraConfig(r=2, target_modules=["0", "2"])}
SCALES = {
    name: peft.IA3Config(target_modules=["0", "2"], feedforward_modules=inputs)
    for name, inputs in (("x", ["2"]), ("y", ["2"]), ("z", []))
}


@pytest.mark.parametrize("order", [o for n in (2, 3) for o in itertools.permutations("xyz", n)], ids="".join)
def test_dora_and_lora_together_are_peft_s(order: tuple[str, ...], tmp_path: Path) -> None:
    theirs, ours = both(LOWRANK, tmp_path)
    theirs.base_model.set_adapter(list(order))
    ours.set_adapter(list(order))
    expected = theirs(X)
    torch.testing.assert_close(ours(X), expected)
    assert not torch.allclose(ours(X), base()(X))
    ours(X).square().sum().backward()
    theirs(X).square().sum().backward()
    wanted = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    for name in order:
        for key, parameter in ours.adapter_parameters(name):
            layer, _, own = key.partition(".")
            kind = "lora_magnitude_vector" if "magnitude" in own else own
            torch.testing.assert_close(parameter.grad, wanted[f"base_model.model.{layer}.{kind}.{name}.weight"])
    for part in (order[:1], order[1:], order):
        ours.merge_adapter(list(part))
        torch.testing.assert_close(ours(X), expected)
        ours.unmerge_adapter()
    torch.testing.assert_close(ours.merge_and_unload()(X), expected)


@pytest.mark.parametrize("order", [o for n in (2, 3) for o in itertools.permutations("xyz", n)], ids="".join)
def test_several_ia3_together_are_peft_s(order: tuple[str, ...], tmp_path: Path) -> None:
    if "z" in order:  # PEFT takes one answer for a layer, whether its input or its output is scaled: that of the first
        configs = dict.fromkeys(SCALES, SCALES["z"])
    else:
        configs = {name: SCALES[name] for name in "xy"}
    theirs, ours = both(configs, tmp_path)
    theirs.base_model.set_adapter(list(order))
    ours.set_adapter(list(order))
    expected = theirs(X)
    torch.testing.assert_close(ours(X), expected)
    theirs.merge_adapter()
    ours.merge_adapter()
    torch.testing.assert_close(ours(X), theirs(X))
    ours.unmerge_adapter()
    assert bits(ours.unload()) == bits(base())
