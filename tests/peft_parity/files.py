"""Adapter files between PEFT and kilotune, and the checks on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kilotune
from tests.peft_parity.oracle import assert_close, assert_same, base, quiet, run, twins


def peft_load(folder: Path, model: nn.Module) -> peft.PeftModel:
    """Load into PEFT: any warning but the known ones fails, and so does a key that it misses or does not expect."""
    with quiet():
        loaded = peft.PeftModel.from_pretrained(model, folder)
        again = loaded.load_adapter(folder, "default")
    assert_same((again.missing_keys, again.unexpected_keys), ([], []), "keys that PEFT misses or does not expect")
    return loaded.eval()


def files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def check_outputs(one: nn.Module, other: nn.Module, relative: float = 1e-5) -> None:
    with torch.no_grad():
        assert_close(run(one), run(other), "output", relative)


def check_acts(model: kilotune.PeftModel) -> None:
    with torch.no_grad():
        changed = run(model)
        with model.disable_adapter():
            plain = run(model)
    assert float((changed - plain).abs().max()) > 1e-3 * float(plain.abs().max()), "the loaded adapter does nothing"


def scrambled(model: kilotune.PeftModel, adapter: str = "default") -> kilotune.PeftModel:
    """Random values, the same for the same names, in every tensor of an adapter."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in sorted(model.adapter_parameters(adapter)):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def check_peft_to_ours(name: str, method: str, dtype: torch.dtype, options: dict[str, Any], folder: Path) -> None:
    """PEFT writes, we load and write, PEFT loads: equal outputs, and every tensor the same bits."""
    both = twins(name, method, dtype=dtype, **options)
    with quiet():
        both.theirs.save_pretrained(folder / "theirs")
    loaded = kilotune.PeftModel.from_pretrained(base(name, dtype), folder / "theirs")
    rounding = 1e-5 if dtype == torch.float32 else 8 * 2.0**-8
    check_acts(loaded)
    check_outputs(loaded, both.theirs, rounding)
    loaded.save_pretrained(folder / "ours")
    (old, before), (new, after) = files(folder / "theirs"), files(folder / "ours")
    twice = {
        k for k in before if ".original_module." in k or ".modules_to_save." in k or k.endswith("predictions.bias")
    }
    assert_same(sorted(after), sorted(set(before) - twice), "keys of the file")
    for key, value in after.items():
        assert torch.equal(value.float(), before[key].float()), key
    bookkeeping = {"peft_version", "auto_mapping", "qalora_group_size", "megatron_core", "runtime_config"}
    listed = {k: [v] if k == "layers_pattern" and isinstance(v, str) else v for k, v in old.items()}
    differing = {k: (v, new.get(k)) for k, v in listed.items() if v not in (None, False, [], {}) and new.get(k) != v}
    heads = {"modules_to_save"} if options.get("task_type") else set()  # PEFT lists heads that are not there too
    # over once it is trained
    names = {"target_modules"} if isinstance(old["target_modules"], list) else set()  # PEFT's are in no order
    assert set(differing) <= bookkeeping | heads | names, differing
    if names:
        assert sorted(old["target_modules"]) == sorted(new["target_modules"])
    check_outputs(peft_load(folder / "ours", base(name, dtype)), both.theirs, rounding)


def check_ours_to_peft(name: str, config: kilotune.AdapterConfig, folder: Path) -> None:
    """We write, PEFT loads and writes, we load: equal outputs at each step, no key missed or unexpected."""
    model = scrambled(kilotune.get_peft_model(base(name), config.replace(target_modules="all-linear")))
    model.save_pretrained(folder / "ours")
    theirs = peft_load(folder / "ours", base(name))
    check_outputs(theirs, model)
    again = kilotune.PeftModel.from_pretrained(base(name), folder / "ours")
    check_outputs(again, model)
    with quiet():
        theirs.save_pretrained(folder / "theirs")
    back = kilotune.PeftModel.from_pretrained(base(name), folder / "theirs")
    check_acts(back)
    check_outputs(back, model)
    (_, one), (_, other) = files(folder / "ours"), files(folder / "theirs")
    assert_same(sorted(one), sorted(other), "keys")
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
