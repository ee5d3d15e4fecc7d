"""LoRA on the parameters of experts, beside PEFT's ``target_parameters``: forward, gradients, training, files."""

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
from tests.peft_parity.oracle import assert_all_close, assert_close, assert_same, quiet
from tests.support import moe

PAIR = ["gate_up_proj", "down_proj"]
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "llama4")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {"r": 3, "lora_alpha": 12, "target_parameters": PAIR}) for name in FAMILIES},
    "one": ("mixtral", {"r": 2, "target_parameters": ["experts.down_proj"]}),
    "router": ("qwen3_moe", {"r": 2, "target_parameters": [*PAIR, "gate.weight"], "use_rslora": True}),
    "modules": ("gpt_oss", {"r": 2, "target_parameters": PAIR, "target_modules": ["q_proj", "v_proj"]}),
    "ranks": ("mixtral", {"r": 2, "target_parameters": PAIR, "rank_pattern": {"experts.gate_up_proj": 5}}),
    "alphas": ("mixtral", {"r": 2, "target_parameters": PAIR, "alpha_pattern": {r".*\.1\..*\.down_proj": 7}}),
    "block": ("mixtral", {"r": 2, "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]}),
    "biases": ("gpt_oss", {"r": 2, "target_parameters": PAIR, "bias": "all"}),
}


def base(family: str) -> Any:
    model = moe.tiny(family)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # its own start is too small for anything to show
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def run(model: nn.Module) -> Tensor:
    logits: Tensor = model(moe.tokens()).logits
    return logits


def loss_of(model: nn.Module) -> Tensor:
    flat = run(model).float().reshape(-1, 32)
    return torch.nn.functional.cross_entropy(flat, torch.arange(len(flat)) * 7 % 32)


def theirs(case: str) -> peft.PeftModel:
    """PEFT's model, nothing of the adapter left at zero; biases moved a little."""
    family, options = CASES[case]
    with quiet(), warnings.catch_warnings():
        # PEFT looks for patterns among modules only, though they act on parameters
        warnings.filterwarnings("ignore", message="The following .* keys did not match any targeted module")
        model = peft.get_peft_model(base(family), peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (p for _, p in sorted(model.named_parameters()) if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def write(model: peft.PeftModel, folder: Path) -> Path:
    with quiet():
        model.save_pretrained(folder)
    return folder


def ours(case: str, folder: Path) -> kilotune.PeftModel:
    return kilotune.PeftModel.from_pretrained(base(CASES[case][0]), folder, is_trainable=True)


def in_peft_form(name: str, value: Tensor, family: str) -> tuple[str, Tensor]:
    """Our tensor as PEFT lays it out, by its documentation: A (experts, rank) x in, B out x (rank, experts)."""
    if value.ndim == 2:
        return name, value
    first = name.endswith("lora_A")
    if family == "llama4":  # says nowhere that it is (E, in, out), so PEFT takes it for (E, out, in)
        first, value = not first, value.transpose(1, 2)
    laid = value.flatten(0, 1) if first else value.permute(1, 2, 0).flatten(1)
    return f"{name[:-1]}{'A' if first else 'B'}", laid


def peft_tensors(model: peft.PeftModel, gradient: bool) -> dict[str, Tensor]:
    """PEFT's trained tensors, or their gradients, by ``<layer>.<parameter>``: nested wrappers by their parameter."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            place = path.removeprefix("base_model.model.")
            if isinstance(module, peft.tuners.lora.ParamWrapper):
                place = f"{place.replace('.base_layer', '')}.{module.parameter_name}"
            for key in ("lora_A", "lora_B"):
                held = getattr(module, key)["default"].weight
                found[f"{place}.{key}"] = held.grad if gradient else held.detach()
    return found


def our_tensors(model: kilotune.PeftModel, family: str, gradient: bool) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.adapter_parameters():
        if ".lora_" in name:
            value = parameter.grad if gradient else parameter.detach()
            assert value is not None, name
            place, laid = in_peft_form(name, value, family)
            found[place] = laid
    return found


@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(case: str, tmp_path: Path) -> None:
    """From PEFT's file: equal values, outputs and gradients, in each implementation."""
    family, other = CASES[case][0], theirs(case)
    mine = ours(case, write(other, tmp_path))
    assert_all_close(our_tensors(mine, family, False), peft_tensors(other, False), "value", 0.0)
    names = ("eager",) if family == "llama4" else ("eager", "batched_mm", "grouped_mm")
    with torch.no_grad(), mine.disable_adapter():
        plain = run(mine)
    for name in names:
        if family != "llama4":
            mine.model.set_experts_implementation(name)
            other.get_base_model().set_experts_implementation(name)
        for model in (mine, other):
            model.zero_grad(set_to_none=True)
            loss_of(model).backward()
        assert float((run(other) - plain).detach().abs().max()) > 1e-2
        assert_close(run(mine), run(other), "output", 2e-5)
        assert_all_close(our_tensors(mine, family, True), peft_tensors(other, True), "gradient", 1e-4)


@pytest.mark.parametrize("case", FAMILIES)
def test_training(case: str, tmp_path: Path) -> None:
    """Three steps: one curve, and equal values at its end."""
    family, other = CASES[case][0], theirs(case)
    mine = ours(case, write(other, tmp_path))
    curves = []
    for model in (mine, other):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        curve = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
    assert abs(curves[0][0] - curves[0][-1]) > 1e-2
    assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), "losses", 1e-5)
    assert_all_close(our_tensors(mine, family, False), peft_tensors(other, False), "value", 1e-4)


@pytest.mark.parametrize("case", FAMILIES)
def test_merge(case: str, tmp_path: Path) -> None:
    other = theirs(case)
    mine = ours(case, write(other, tmp_path)).merge_and_unload()
    with quiet():
        merged = other.merge_and_unload()
    own, wanted = dict(mine.named_parameters()), dict(merged.named_parameters())
    assert_same(sorted(own), sorted(wanted), "names")
    for name, value in wanted.items():
        torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_files_both_ways(case: str, tmp_path: Path) -> None:
    """PEFT writes, we load and write, PEFT loads: the same keys and bits, and no key missed or unexpected."""
    family, other = CASES[case][0], theirs(case)
    mine = ours(case, write(other, tmp_path / "theirs"))
    mine.save_pretrained(tmp_path / "ours")
    before, after = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert_same(sorted(after), sorted(before), "keys of the file")
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    old, new = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    for key in ("peft_type", "r", "lora_alpha", "use_rslora", "bias", "rank_pattern", "alpha_pattern"):
        assert_same(new[key], old[key], key)
    for key in ("target_modules", "target_parameters"):
        assert_same(sorted(new[key] or []), sorted(old[key] or []), key)
    assert "kilotune" not in new
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following .* keys did not match any targeted module")
        loaded = peft.PeftModel.from_pretrained(base(family), tmp_path / "ours")
        again = loaded.load_adapter(tmp_path / "ours", "default")
    assert_same((again.missing_keys, again.unexpected_keys), ([], []), "keys that PEFT misses or does not expect")
    with torch.no_grad():
        assert_close(run(loaded.eval()), run(mine), "output", 2e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["w1", "w2", "w3"]])
def test_what_peft_makes_of_old_targets(targets: Any, tmp_path: Path) -> None:
    """PEFT turns a Mixtral's linear experts of earlier times into parameters; its file says so, and is read."""
    with quiet(), warnings.catch_warnings():
        # its own patterns for these, which it then does not find, though they act
        warnings.filterwarnings("ignore", message="The following .* keys did not match any targeted module")
        other = peft.get_peft_model(
            base("mixtral"), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        ).eval()
        other.save_pretrained(tmp_path)
    mine = kilotune.PeftModel.from_pretrained(base("mixtral"), tmp_path)
    with torch.no_grad():
        assert_close(run(mine), run(other), "output", 2e-5)
        with mine.disable_adapter():
            assert float((run(mine) - run(other)).abs().max()) > 1e-2


def test_peft_refuses_what_it_has_no_form_for(tmp_path: Path) -> None:
    """A file of VeRA on experts would be half read: PEFT must say that it cannot."""
    model = kilotune.get_peft_model(
        base("mixtral"),
        kilotune.VeraConfig(r=4, target_parameters=PAIR, target_modules=["q_proj"], save_projection=True),
    )
    with torch.no_grad():
        for _, parameter in model.adapter_parameters():
            parameter.add_(0.3)
    model.save_pretrained(tmp_path)
    again = kilotune.PeftModel.from_pretrained(base("mixtral"), tmp_path)
    with torch.no_grad():
        assert_close(run(again), run(model), "output", 1e-5)
    with quiet(), pytest.raises(KeyError, match="KILOTUNE_VERA"):
        peft.PeftModel.from_pretrained(base("mixtral"), tmp_path)
