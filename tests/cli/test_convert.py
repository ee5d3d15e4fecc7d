"""``kilotune convert``: what it writes is loaded by PEFT and by kilotune, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from kilotune import LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.adapter_files.files import CONFIG_NAME, WEIGHTS_NAME
from kilotune.model.parameter_report import count_parameters
from tests.support.cli_helpers import as_json, distance, error, gpt2, kilotune, llama, logits, saved, shake

pytestmark = [
    # PEFT reads an attribute that transformers has renamed since.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
EXACT = 2e-5
NESTED = VeraConfig(r=6, target_modules=["q_proj", "down_proj"], projection_prng_key=3, task_type="CAUSAL_LM")
SHAPE = NESTED.replace(sharing="shape")


def written(folder: Path, config: Any, make: Any = llama) -> torch.Tensor:
    """Write a trained-like adapter; returns what the adapted model puts out."""
    model = shake(get_peft_model(make(), config))
    model.save_pretrained(folder)
    return logits(model)


def ours(folder: Path, make: Any = llama) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(make(), folder).eval())


def theirs(folder: Path, make: Any = llama) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(make(), str(folder)).eval())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The base's config.json alone."""
    file = tmp_path / "config.json"
    values = {**llama().config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    file.write_text(json.dumps(values, default=str))
    return file


@pytest.mark.parametrize("config", [NESTED, SHAPE], ids=["nested", "shape"])
def test_vera_to_lora_and_to_peft_and_back(tmp_path: Path, base: Path, config: VeraConfig) -> None:
    want = written(tmp_path / "vera", config)
    lora = as_json("convert", tmp_path / "vera", tmp_path / "lora", "--to", "lora", "--base", base)
    assert lora["what"] == "vera of rank 6 as LoRA of rank 6"
    assert (lora["errors"], lora["worst"]) == ({}, None)
    as_json("convert", tmp_path / "vera", tmp_path / "peft", "--to", "peft", "--base", base)
    for folder in (tmp_path / "lora", tmp_path / "peft"):
        assert distance(want, theirs(folder)) < EXACT
        assert distance(want, ours(folder)) < EXACT
    back = as_json("convert", tmp_path / "peft", tmp_path / "back", "--to", "kilotune", "--base", base)
    assert "portable matrices from the seed" in back["what"]
    assert distance(want, ours(tmp_path / "back")) < EXACT
    assert not any("vera_A" in key for key in load_file(tmp_path / "back" / WEIGHTS_NAME))
    section = json.loads((tmp_path / "back" / CONFIG_NAME).read_text())["kilotune"]
    assert section.get("sharing", "nested") == config.sharing


def test_a_smaller_rank_prints_its_errors(tmp_path: Path, base: Path) -> None:
    written(tmp_path / "vera", NESTED)
    words = ("convert", tmp_path / "vera", tmp_path / "small", "--to", "lora", "--rank", 3, "--base", base)
    done = as_json(*words)
    assert len(done["errors"]) == 4
    worst = max(done["errors"], key=done["errors"].get)
    assert done["worst"] == {"layer": worst, "error": done["errors"][worst]}
    assert 0.01 < done["worst"]["error"] < 1
    tensors = load_file(tmp_path / "small" / WEIGHTS_NAME)
    assert {min(value.shape) for value in tensors.values()} == {3}
    text = kilotune(*words, "--force").stdout
    assert f"worst {done['worst']['error']:.4f} ({worst})" in text
    assert text.index(worst) < min(text.index(name) for name in done["errors"] if name != worst)
    assert count_parameters(PeftModel.from_pretrained(llama(), tmp_path / "small")).frozen_adapters == sum(
        value.numel() for value in tensors.values()
    )


def test_conv1d(tmp_path: Path) -> None:
    want = written(tmp_path / "vera", VeraConfig(r=5, target_modules=["c_attn", "c_fc"]), gpt2)
    saved(gpt2(), tmp_path / "base")
    for form in ("lora", "peft"):
        as_json("convert", tmp_path / "vera", tmp_path / form, "--to", form, "--base", tmp_path / "base")
        assert distance(want, theirs(tmp_path / form, gpt2)) < EXACT


def test_a_file_of_peft_becomes_small(tmp_path: Path, base: Path) -> None:
    model = peft.get_peft_model(llama(), peft.VeraConfig(r=6, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    want = logits(model)
    model.save_pretrained(tmp_path / "theirs")
    done = as_json("convert", tmp_path / "theirs", tmp_path / "ours", "--to", "kilotune", "--base", base)
    assert "PEFT's matrices from the seed" in done["what"]
    assert done["files"][WEIGHTS_NAME] < (tmp_path / "theirs" / WEIGHTS_NAME).stat().st_size
    assert distance(want, ours(tmp_path / "ours")) < EXACT
    assert as_json("inspect", tmp_path / "ours", "--base", base)["checksums"]["projections"] == "verified"
    as_json("convert", tmp_path / "ours", tmp_path / "again", "--to", "peft", "--base", base)
    assert distance(want, theirs(tmp_path / "again")) < EXACT


def test_lora_changes_its_form_without_a_base(tmp_path: Path, base: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "theirs")
    done = as_json("convert", tmp_path / "theirs", tmp_path / "ours", "--to", "kilotune")
    assert "written anew, with a checksum" in done["what"]
    as_json("convert", tmp_path / "ours", tmp_path / "peft", "--to", "peft", "--base", base)  # given, it is checked
    for folder in ("ours", "peft"):
        assert distance(logits(model), ours(tmp_path / folder)) < EXACT
        assert torch.equal(logits(model), theirs(tmp_path / folder))
    assert as_json("inspect", tmp_path / "ours")["checksums"]["tensors"] == "verified"
    smaller = as_json("convert", tmp_path / "ours", tmp_path / "two", "--to", "lora", "-r", 2, "--base", base)
    assert smaller["worst"]["error"] > 0


def test_a_built_in_base(tmp_path: Path) -> None:
    from kilotune.plan import load_base

    model = load_base("four-layer").model.to_empty(device="cpu")
    shake(get_peft_model(model, VeraConfig(r=4, target_modules=["1", "2"]))).save_pretrained(tmp_path / "vera")
    as_json("convert", tmp_path / "vera", tmp_path / "lora", "--to", "lora", "--base", "four-layer")
    assert set(load_file(tmp_path / "lora" / WEIGHTS_NAME)) == {
        f"base_model.model.{i}.lora_{m}.weight" for i in (1, 2) for m in "AB"
    }


def test_bad_input(tmp_path: Path, base: Path) -> None:
    written(tmp_path / "vera", NESTED)
    written(tmp_path / "lora", LoraConfig(r=4, target_modules=["q_proj"]))
    out = tmp_path / "out"
    words = ("convert", tmp_path / "vera", out, "--to")
    assert "does not say what its base is" in error(*words, "lora")
    assert "--rank is for --to lora" in error(*words, "peft", "--rank", 2, "--base", base)
    assert "rank 6 is not below the adapter's own 6; leave it out" in error(*words, "lora", "-r", 6, "--base", base)
    assert "expected a whole number >= 1" in error(*words, "lora", "-r", 0, "--base", base)
    assert "is not one of" in error(*words, "gguf", "--base", base)
    assert "Missing option '--to'" in error("convert", tmp_path / "vera", out)
    assert "base 'gpt2': the target modules match nothing" in error(*words, "lora", "--base", "gpt2")
    other = ("convert", tmp_path / "lora", out, "--to")
    assert "is a LoRA adapter already" in error(*other, "lora", "--base", base)
    assert "--revision is of --base" in error(*other, "peft", "--revision", "main")
    assert not out.exists()
    assert "is, or contains," in error("convert", tmp_path / "vera", tmp_path / "vera", "--to", "lora", "--force")
    assert "is there and not empty" in error("convert", tmp_path / "vera", tmp_path / "lora", "--to", "lora")


def test_a_local_path_that_an_adapter_names_is_not_opened(tmp_path: Path, base: Path) -> None:
    written(tmp_path / "vera", NESTED.replace(base_model_name_or_path=str(base)))
    text = error("convert", tmp_path / "vera", tmp_path / "out", "--to", "lora")
    assert "names a local path as its base" in text
    assert kilotune("convert", tmp_path / "vera", tmp_path / "out", "--to", "lora", "--base", base).exit_code == 0
