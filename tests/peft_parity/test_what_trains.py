"""Which adapters have gradients after each call, against PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

import kilotune
from kilotune import AdapterError
from tests.support.models import tiny_llama

STEPS: dict[str, tuple[tuple[str, Any], ...]] = {
    "set what was loaded": (("set_adapter", "default"),),
    "load to train": (
        ("set_adapter", "default"),
        ("load", ("b", True)),
        ("set_adapter", "b"),
        ("set_adapter", "default"),
    ),
    "load not to train": (("set_adapter", "default"), ("load", ("b", False)), ("set_adapter", "b")),
    "set not to train": (("load", ("b", True)), ("set_inference", "b"), ("set_adapter", "b"), ("set_inference", "b")),
    "add": (("add", "b"), ("set_adapter", "b"), ("add", "c")),
    "delete another": (("set_adapter", "default"), ("load", ("b", True)), ("delete_adapter", "b")),
    "delete the active one": (("load", ("b", True)), ("set_adapter", "b"), ("delete_adapter", "b")),
    "delete the one loaded to run": (("add", "b"), ("delete_adapter", "default")),
    "delete another of one that only runs": (("add", "b"), ("delete_adapter", "b")),
}


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def step(library: Any, model: Any, folder: Path, what: str, argument: Any) -> None:
    config = library.LoraConfig(r=2, target_modules=["0"])
    if what == "load":
        model.load_adapter(folder, argument[0], is_trainable=argument[1])
    elif what == "add":
        model.add_adapter(argument, config)
    elif what == "set_inference":
        model.set_adapter(argument, inference_mode=True)
    else:
        getattr(model, what)(argument)


def trained(model: nn.Module, prefix: str) -> dict[str, bool]:
    """By adapter, whether its parameters have gradients."""
    found: dict[str, bool] = {}
    for name, parameter in model.named_parameters():
        if prefix in name:
            adapter = name.split(".")[-2]
            assert found.setdefault(adapter, parameter.requires_grad) is parameter.requires_grad
    return found


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_what_trains_is_what_trains_in_peft(steps: Any, trainable: bool, tmp_path: Path) -> None:
    peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, when the active adapter is deleted
        models = [
            library.PeftModel.from_pretrained(base(), tmp_path, is_trainable=trainable) for library in (peft, kilotune)
        ]
        for what, argument in (("nothing", None), *steps):
            if what != "nothing":
                for library, model in zip((peft, kilotune), models, strict=True):
                    step(library, model, tmp_path, what, argument)
            theirs, ours = trained(models[0], "lora_"), trained(models[1], ".adapters.")
            assert ours == theirs, (what, argument)
            assert models[1].active_adapters == models[0].active_adapters


@pytest.mark.parametrize("inference", [False, True])
def test_a_config_for_inference_starts_frozen(inference: bool) -> None:
    models = []
    for library in (peft, kilotune):
        config = library.LoraConfig(r=2, target_modules=["0"], inference_mode=inference)
        models.append(library.get_peft_model(base(), config))
    assert trained(models[1], ".adapters.") == trained(models[0], "lora_") == {"default": not inference}


def test_configs_are_for_reading() -> None:
    config = kilotune.LoraConfig(r=2, target_modules=["0"])
    model = kilotune.get_peft_model(base(), config)
    for change in (
        lambda: model.peft_config.__setitem__("b", config),
        lambda: model.peft_config.update(b=config),
        lambda: model.peft_config.pop("default"),
        lambda: model.peft_config.clear(),
    ):
        with pytest.raises(AdapterError, match=r"for reading: .* add_adapter\(name, config\)"):
            change()
    own = dict(model.peft_config)
    own["b"] = config
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "q_proj"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_tie_that_merging_took_apart_is_out_of_the_config(target: str, saved: bool, tmp_path: Path) -> None:
    import torch

    chosen = ["up_proj"] if saved else [target]
    config = kilotune.LoraConfig(
        r=2, target_modules=chosen, modules_to_save=[target] if saved else None, init_lora_weights=False
    )
    model = kilotune.get_peft_model(tiny_llama(tie=True).eval(), config)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.1)
    ids = torch.tensor([[1, 2, 3]])
    y = model(input_ids=ids).logits
    plain: Any = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is (target == "q_proj")
    plain.tie_weights()
    torch.testing.assert_close(plain(input_ids=ids).logits, y)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, y)
