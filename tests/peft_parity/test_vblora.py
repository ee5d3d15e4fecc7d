"""VB-LoRA beside PEFT's, live: outputs, gradients, training and files, in both directions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import constants
from safetensors.torch import load_file
from torch import Tensor, nn

import kilotune
from kilotune.injection.targets import DEFAULT_TARGETS
from kilotune.methods import VbLoraConfig
from tests.peft_parity.oracle import OPTIMIZERS, assert_close, assert_same, base, loss_of, quiet, run

TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "v_proj"],
    "opt": ["q_proj", "fc1"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
    "mlp": r"first|blocks\.\d\.[13]",
}
WEIGHTS = "adapter_model.safetensors"
BANK = "vblora_vector_bank"


def options_of(name: str, **options: Any) -> dict[str, Any]:
    return {"r": 3, "num_vectors": 9, "vector_length": 4, "target_modules": TARGETS[name], **options}


def ours_by_name(model: kilotune.PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    return {key: p for key, p in model.adapter_parameters(adapter) if "vblora" in key}


def theirs_by_name(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    found = {BANK: model.base_model.vblora_vector_bank[adapter]}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.vblora.VBLoRALayer) and adapter in module.vblora_logits_A:
            layer = name.removeprefix("base_model.model.")
            for key in ("vblora_logits_A", "vblora_logits_B"):
                found[f"{layer}.{key}"] = getattr(module, key)[adapter]
    return found


def fill(ours: kilotune.PeftModel, theirs: Any, adapter: str = "default") -> None:
    """The same numbers of some size in both."""
    mine, other = ours_by_name(ours, adapter), theirs_by_name(theirs, adapter)
    assert_same(sorted(mine), sorted(other), "parameters")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key in sorted(mine):
            value = torch.randn(mine[key].shape, generator=generator)
            mine[key].copy_(value)
            other[key].copy_(value)


def pair(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[kilotune.PeftModel, peft.PeftModel]:
    made = options_of(name, **options)
    ours = kilotune.get_peft_model(base(name, dtype), VbLoraConfig(**made))
    with quiet():
        theirs = peft.get_peft_model(base(name, dtype), peft.VBLoRAConfig(**made)).eval()
    fill(ours, theirs)
    return ours, theirs


def check_outputs(ours: nn.Module, theirs: nn.Module, name: str, relative: float = 1e-5) -> None:
    with torch.no_grad():
        y = run(ours)
        assert_close(y, run(theirs), "output", relative)
        move = float((y - run(base(name, y.dtype))).abs().max() / y.abs().max())
    assert move > 1e-2, f"the adapter moves the output by {move:.2g} only"


@pytest.mark.parametrize("topk", [1, 2, 9])
@pytest.mark.parametrize("name", TARGETS)
def test_factors_are_pefts(name: str, topk: int) -> None:
    ours, theirs = pair(name, topk=topk)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "vblora_logits_A")
    }
    assert_same(sorted(ours.adapted_layers()), sorted(layers), "adapted layers")
    for key, layer in ours.adapted_layers().items():
        delta = layer.slot("default").delta()
        a, b = layers[key]._get_lora_matrices("default")
        assert_close(delta.a, a, f"{key}: A", 1e-6)
        assert_close(delta.b, b, f"{key}: B", 1e-6)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_forward_and_training(name: str, optimizer: str) -> None:
    ours, theirs = pair(name, bias="vblora_only" if name == "bert" else "none")
    check_outputs(ours, theirs, name)
    curves, gradients = [], []
    for model, numbers in ((ours, ours_by_name(ours)), (theirs, theirs_by_name(theirs))):
        stepper = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        losses = []
        for step in range(4):
            stepper.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            if step == 0:
                gradients.append({key: p.grad.clone() for key, p in numbers.items()})
            stepper.step()
            losses.append(loss.detach())
        curves.append(losses)
    for key, gradient in gradients[1].items():
        assert_close(gradients[0][key], gradient, f"gradient of {key}", 1e-4)
    for mine, other in zip(*curves, strict=True):
        assert_close(mine, other, "loss")
    assert abs(float(curves[0][0] - curves[0][-1])) > 1e-4, "the loss does not move"
    for key, value in theirs_by_name(theirs).items():
        assert_close(ours_by_name(ours)[key], value, f"{key} after training", 1e-4)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_merged_weights(name: str) -> None:
    ours, theirs = pair(name)
    with quiet():
        merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    for (key, mine), (_, other) in zip(merged.state_dict().items(), expected.state_dict().items(), strict=True):
        assert_close(mine, other, key)


def test_bfloat16() -> None:
    """PEFT multiplies in float32 here; 8 roundings of 2^-8 are allowed."""
    ours, theirs = pair("bert", torch.bfloat16)
    check_outputs(ours, theirs, "bert", relative=8 * 2.0**-8)


def test_two_adapters() -> None:
    """Each of its own bank; PEFT gives all of a model's adapters one number of vectors."""
    ours, theirs = pair("mlp")
    made = options_of("mlp", r=2, topk=3, target_modules=r"first|blocks\.\d\.3")
    ours.add_adapter("other", VbLoraConfig(**made))
    theirs.add_adapter("other", peft.VBLoRAConfig(**made))
    fill(ours, theirs, "other")
    with torch.no_grad():
        for numbers in (ours_by_name(ours, "other"), theirs_by_name(theirs, "other")):
            numbers[BANK].mul_(0.5)
    for names in (["other"], ["default", "other"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        check_outputs(ours, theirs, "mlp")


# -- files ------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "logits": {},
    "weights": {"save_only_topk_weights": True},
    "weights of three": {"save_only_topk_weights": True, "topk": 3},
    "one vector": {"save_only_topk_weights": True, "topk": 1},
    "many vectors": {"save_only_topk_weights": True, "num_vectors": 300},
    "biases": {"bias": "all"},
    "own biases, weights": {"bias": "vblora_only", "save_only_topk_weights": True},
    "head": {"modules_to_save": ["head"]},
}
FILES = [(n, form) for n in ("mlp", "gpt2", "bert") for form in FORMS if n == "mlp" or form != "head"]


@pytest.mark.parametrize(("name", "form"), FILES)
def test_peft_to_ours_and_back(name: str, form: str, tmp_path: Path) -> None:
    _, theirs = pair(name, **FORMS[form])
    with quiet():
        theirs.save_pretrained(tmp_path / "peft")
    ours = kilotune.PeftModel.from_pretrained(base(name), tmp_path / "peft")
    check_outputs(ours, theirs, name)
    ours.save_pretrained(tmp_path / "ours")
    written, given = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "peft"))
    given = {k: v for k, v in given.items() if ".original_module." not in k and ".modules_to_save." not in k}
    assert_same(sorted(written), sorted(given), "keys")
    for key, value in given.items():
        assert written[key].dtype == value.dtype, key
        assert torch.allclose(written[key].float(), value.float(), atol=1e-6), key
    with quiet():
        again = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
    check_outputs(again, theirs, name)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
@pytest.mark.parametrize("weights", [False, True])
def test_ours_to_peft_and_back(name: str, weights: bool, tmp_path: Path) -> None:
    made = options_of(name, save_only_topk_weights=weights, init_vector_bank_bound=1.0, vblora_dropout=0.1)
    ours = kilotune.get_peft_model(base(name), VbLoraConfig(**made)).eval()
    ours.save_pretrained(tmp_path / "ours")
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
        check_outputs(theirs, ours, name)
        theirs.save_pretrained(tmp_path / "peft")
    check_outputs(kilotune.PeftModel.from_pretrained(base(name), tmp_path / "peft"), ours, name)


def test_a_planted_fault_is_noticed() -> None:
    ours, theirs = pair("mlp")
    with torch.no_grad():
        ours_by_name(ours)[BANK].copy_(ours_by_name(ours)[BANK].roll(1, 0))
    with pytest.raises(AssertionError, match="output: error"):
        check_outputs(ours, theirs, "mlp")


def test_default_targets_are_pefts() -> None:
    """gemma4 has a regular expression there; ours has more architectures, from LoRA's table."""
    ours = {**DEFAULT_TARGETS, **kilotune.METHODS["vblora"].default_targets}
    theirs = dict(constants.TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING)
    theirs.pop("gemma4")
    assert {name: list(ours[name]) for name in theirs} == theirs


def test_options_and_defaults_are_pefts() -> None:
    made, expected = VbLoraConfig().to_dict(), peft.VBLoRAConfig().to_dict()
    own = {key for key in expected if key in made and key not in ("task_type", "peft_type", "peft_version")}
    assert {
        "r",
        "num_vectors",
        "vector_length",
        "topk",
        "save_only_topk_weights",
        "vblora_dropout",
        "init_vector_bank_bound",
        "init_logits_std",
    } < own
    assert {key: made[key] for key in own} == {key: expected[key] for key in own}
    assert set(expected) - set(made) <= {"peft_version", "auto_mapping"}


def test_a_file_is_pefts_own(tmp_path: Path) -> None:
    """Nothing of it is drawn anew, so none is closed to PEFT."""
    kilotune.get_peft_model(base("mlp"), VbLoraConfig(**options_of("mlp"))).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "VBLORA"
