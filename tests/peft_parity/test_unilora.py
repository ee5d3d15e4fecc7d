"""Uni-LoRA beside PEFT's, live: the same start, outputs, gradients, training and files, in both directions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kilotune
from kilotune.methods import UniLoraConfig
from tests.peft_parity.oracle import OPTIMIZERS, assert_close, assert_same, base, loss_of, quiet, run

TARGETS: dict[str, Any] = {
    "llama": ["q_proj", "v_proj"],
    "opt": ["q_proj", "fc1"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
    "mlp": "all-linear",
}
WEIGHTS = "adapter_model.safetensors"


def options_of(name: str, **options: Any) -> dict[str, Any]:
    return {"r": 3, "theta_d_length": 50, "proj_seed": 7, "target_modules": TARGETS[name], **options}


def pair(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[kilotune.PeftModel, peft.PeftModel]:
    """The same adapter in both, with numbers of some size in the vector and, where they are trained, the biases."""
    made = options_of(name, **options)
    ours = kilotune.get_peft_model(base(name, dtype), UniLoraConfig(generator="peft", **made))
    with quiet():
        theirs = peft.get_peft_model(base(name, dtype), peft.UniLoraConfig(**made)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        value = torch.randn(50, generator=generator)
        vector_of(ours).copy_(value)
        peft_vector(theirs).copy_(value)
    return ours, theirs


def vector_of(model: kilotune.PeftModel, adapter: str = "default") -> Tensor:
    return dict(model.adapter_parameters(adapter))["unilora_theta_d"]


def peft_vector(model: Any, adapter: str = "default") -> Tensor:
    vector: Tensor = model.base_model.unilora_theta_d[adapter]
    return vector


def check_outputs(ours: nn.Module, theirs: nn.Module, name: str, relative: float = 1e-5) -> None:
    with torch.no_grad():
        y = run(ours)
        assert_close(y, run(theirs), "output", relative)
        move = float((y - run(base(name, y.dtype))).abs().max() / y.abs().max())
    assert move > 1e-2, f"the adapter moves the output by {move:.2g} only"


@pytest.mark.parametrize("weights", [True, False])
def test_the_same_seed_of_torch_gives_the_same_start(weights: bool) -> None:
    made = options_of("mlp", init_weights=weights, init_theta_d_bound=0.25)
    vectors = []
    for library, extra in ((kilotune, {"generator": "peft"}), (peft, {})):
        net = base("mlp")
        torch.manual_seed(4)
        model = library.get_peft_model(
            net, library.get_config("unilora", **made, **extra) if extra else peft.UniLoraConfig(**made)
        )
        vectors.append(vector_of(model) if extra else peft_vector(model))
    assert torch.equal(*vectors)


@pytest.mark.parametrize("name", TARGETS)
def test_factors_are_equal_to_the_bit(name: str) -> None:
    ours, theirs = pair(name)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "unilora_indices_A")
    }
    assert_same(sorted(ours.adapted_layers()), sorted(layers), "adapted layers")
    for key, layer in ours.adapted_layers().items():
        delta = layer.slot("default").delta()
        a, b = layers[key]._get_lora_matrices("default")
        assert torch.equal(delta.a, a), key
        assert torch.equal(delta.b, b), key


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_forward_and_training(name: str, optimizer: str) -> None:
    ours, theirs = pair(name, bias="unilora_only" if name == "bert" else "none")
    check_outputs(ours, theirs, name)
    curves = []
    for model, vector in ((ours, vector_of(ours)), (theirs, peft_vector(theirs))):
        stepper = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
        losses = []
        for step in range(4):
            stepper.zero_grad(set_to_none=True)
            loss = loss_of(model)
            loss.backward()
            if step == 0:
                losses.append(vector.grad.clone())
            stepper.step()
            losses.append(loss.detach())
        curves.append(losses)
    assert_close(curves[0][0], curves[1][0], "gradient of the vector", 1e-4)
    for mine, other in zip(curves[0][1:], curves[1][1:]):
        assert_close(mine, other, "loss")
    assert abs(float(curves[0][1] - curves[0][-1])) > 1e-4, "the loss does not move"
    assert_close(vector_of(ours), peft_vector(theirs), "the vector after training", 1e-4)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_merged_weights(name: str) -> None:
    ours, theirs = pair(name)
    with quiet():
        merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    for (key, mine), (_, other) in zip(merged.state_dict().items(), expected.state_dict().items(), strict=True):
        assert_close(mine, other, key)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_bfloat16(name: str) -> None:
    """PEFT multiplies in float32 here, and rounds its norms to bfloat16; 8 roundings of 2^-8 are allowed."""
    ours, theirs = pair(name, torch.bfloat16)
    check_outputs(ours, theirs, name, relative=8 * 2.0**-8)


def test_two_adapters() -> None:
    ours, theirs = pair("mlp")
    made = options_of("mlp", r=2, theta_d_length=9, target_modules=["first", "head"])
    ours.add_adapter("other", UniLoraConfig(generator="peft", **made))
    theirs.add_adapter("other", peft.UniLoraConfig(**made))
    with torch.no_grad():
        vector_of(ours, "other").fill_(0.7)
        peft_vector(theirs, "other").fill_(0.7)
    for names in (["other"], ["default", "other"]):
        ours.set_adapter(names)
        theirs.base_model.set_adapter(names)
        check_outputs(ours, theirs, "mlp")


# -- files ------------------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "seed": {},
    "indices": {"save_indices": True},
    "biases": {"bias": "all"},
    "own biases, indices": {"bias": "unilora_only", "save_indices": True},
    "head": {"modules_to_save": ["head"]},
}
FILES = [(n, form) for n in ("mlp", "gpt2", "bert") for form in FORMS if n == "mlp" or form != "head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, form", FILES)
def test_peft_to_ours_and_back(name: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, theirs = pair(name, dtype, **FORMS[form])
    with quiet():
        theirs.save_pretrained(tmp_path / "peft")
    ours = kilotune.PeftModel.from_pretrained(base(name, dtype), tmp_path / "peft")
    allowed = 1e-5 if dtype == torch.float32 else 8 * 2.0**-8
    check_outputs(ours, theirs, name, allowed)
    ours.save_pretrained(tmp_path / "ours")
    written, given = (load_file(tmp_path / side / WEIGHTS) for side in ("ours", "peft"))
    given = {k: v for k, v in given.items() if ".original_module." not in k and ".modules_to_save." not in k}
    assert_same(sorted(written), sorted(given), "keys")
    for key, value in given.items():
        assert torch.equal(written[key].to(value.dtype), value), key
        assert written[key].is_floating_point() == value.is_floating_point()
    with quiet():
        again = peft.PeftModel.from_pretrained(base(name, dtype), tmp_path / "ours").eval()
    check_outputs(again, theirs, name, 1e-6)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
@pytest.mark.parametrize("generator, save_indices", [("peft", False), ("peft", True), ("portable", True)])
def test_ours_to_peft_and_back(name: str, generator: str, save_indices: bool, tmp_path: Path) -> None:
    made = options_of(name, generator=generator, save_indices=save_indices, init_weights=False, unilora_dropout=0.1)
    ours = kilotune.get_peft_model(base(name), UniLoraConfig(**made)).eval()
    ours.save_pretrained(tmp_path / "ours")
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
        check_outputs(theirs, ours, name)
        theirs.save_pretrained(tmp_path / "peft")
    check_outputs(kilotune.PeftModel.from_pretrained(base(name), tmp_path / "peft"), ours, name)


def test_peft_refuses_portable_indices_that_are_not_in_the_file(tmp_path: Path) -> None:
    """It would draw its own for the seed, and not notice."""
    model = kilotune.get_peft_model(base("mlp"), UniLoraConfig(**options_of("mlp")))
    model.save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="KILOTUNE_UNILORA"):
        peft.PeftModel.from_pretrained(base("mlp"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["theta_d_length"] == 50


def test_a_planted_fault_is_noticed() -> None:
    ours, theirs = pair("mlp", proj_seed=8)
    other, _ = pair("mlp")
    with pytest.raises(AssertionError, match="output: error"):
        check_outputs(other, theirs, "mlp")
    check_outputs(ours, theirs, "mlp")


def test_default_targets_are_pefts_which_are_those_of_lora() -> None:
    """What differs between PEFT's table and ours for LoRA, test_selection.py knows."""
    from peft.utils import constants

    tables = [
        getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING") for method in ("UNILORA", "LORA")
    ]
    assert_same(tables[0], tables[1], "PEFT's default targets of Uni-LoRA")
    own = [kilotune.METHODS[name].default_targets for name in ("unilora", "lora")]
    assert_same(own[0], own[1], "our default targets of Uni-LoRA")


def test_options_and_defaults_are_pefts() -> None:
    made, expected = UniLoraConfig().to_dict(), peft.UniLoraConfig().to_dict()
    own = {key for key in expected if key in made and key not in ("task_type", "peft_type", "peft_version")}
    assert {
        "r",
        "proj_seed",
        "theta_d_length",
        "unilora_dropout",
        "init_theta_d_bound",
        "init_weights",
        "save_indices",
    } < own
    assert {key: made[key] for key in own} == {key: expected[key] for key in own}
    assert set(expected) - set(made) <= {"peft_version", "auto_mapping"}
