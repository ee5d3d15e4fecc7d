"""Write the golden files with PEFT: python tests/golden/make_golden.py [folder]

Each case is a small adapter folder as PEFT writes it, and an entry of manifest.json: the base model's kind, the
tensors' names and shapes, the SHA-256 of the files, and the outputs that PEFT computed. Base models, inputs and
adapter values are arithmetic (net.py), so nothing else need be kept. The files here are what PEFT 0.21 wrote, and
stay as they are; run the script into another folder to compare a newer PEFT with them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tests.golden.net import base, fill, inputs  # noqa: E402 - after the path

BFLOAT16 = "bfloat16"
COMMON = {
    "VERA": {"r": 3, "target_modules": ["first", "second", "third"]},
    "LORA": {"r": 2, "lora_alpha": 3, "target_modules": ["first", "second", "third"]},
}
CONFIGS = {"VERA": peft.VeraConfig, "LORA": peft.LoraConfig}

# name -> (base model, dtype of the base, {adapter: (method, options)})
CASES: dict[str, tuple[str, str, dict[str, tuple[str, dict[str, Any]]]]] = {
    "vera": ("linear", "float32", {"default": ("VERA", {})}),
    "vera_seed_only": (
        "linear",
        "float32",
        {"default": ("VERA", {"save_projection": False, "projection_prng_key": 7})},
    ),
    "vera_conv1d": ("conv1d", "float32", {"default": ("VERA", {})}),
    "vera_bias_all": ("linear", "float32", {"default": ("VERA", {"bias": "all"})}),
    "vera_bias_only": ("conv1d", "float32", {"default": ("VERA", {"bias": "vera_only"})}),
    "vera_head": ("linear", "float32", {"default": ("VERA", {"modules_to_save": ["head"], "bias": "all"})}),
    "vera_bfloat16": ("linear", BFLOAT16, {"default": ("VERA", {})}),
    "lora": ("linear", "float32", {"default": ("LORA", {})}),
    "lora_conv1d": ("conv1d", "float32", {"default": ("LORA", {"use_rslora": True})}),
    "lora_bias_all": ("linear", "float32", {"default": ("LORA", {"bias": "all"})}),
    "lora_bias_only": ("linear", "float32", {"default": ("LORA", {"bias": "lora_only"})}),
    "lora_patterns": (
        "linear",
        "float32",
        {"default": ("LORA", {"rank_pattern": {"first": 4}, "alpha_pattern": {"third": 9}})},
    ),
    "lora_bfloat16": ("linear", BFLOAT16, {"default": ("LORA", {"modules_to_save": ["head"]})}),
    "several": (
        "linear",
        "float32",
        {
            "default": ("LORA", {}),
            # Not named "second": PEFT 0.21 drops a layer's tensors when another adapter has the layer's name.
            "other": ("LORA", {"r": 1, "target_modules": ["first", "head"], "exclude_modules": ["first"]}),
        },
    ),
}


def make(name: str, folder: Path) -> dict[str, Any]:
    """Write one case below ``folder``; returns its entry of the manifest."""
    kind, dtype, wanted = CASES[name]
    with warnings.catch_warnings():
        # PEFT tells that a seed-only file relies on torch's generator, and that it sees Conv1D and Linear by itself.
        warnings.filterwarnings("ignore", message="Specified to not save vera_A and vera_B", category=UserWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        configs = {a: CONFIGS[method](**{**COMMON[method], **more}) for a, (method, more) in wanted.items()}
        first, *others = configs
        model = peft.get_peft_model(base(kind, getattr(torch, dtype)), configs[first], first)
        for other in others:
            model.add_adapter(other, configs[other])
        outputs = {}
        for adapter in configs:
            model.set_adapter(adapter)
            fill({key: p for key, p in model.named_parameters() if p.requires_grad})
        for adapter in configs:
            model.set_adapter(adapter)
            with torch.no_grad():
                output = model.eval()(inputs().to(getattr(torch, dtype))).double()
            outputs[adapter] = [float(f"{value:.8g}") for value in output.flatten().tolist()]
        model.save_pretrained(folder / name)
    adapters = {}
    for adapter in configs:
        place = folder / name if adapter == "default" else folder / name / adapter
        (place / "README.md").unlink(missing_ok=True)  # PEFT's model card, which nothing reads
        tensors = load_file(place / "adapter_model.safetensors")
        adapters[adapter] = {
            "folder": str(place.relative_to(folder)),
            "sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(place.glob("adapter_*"))},
            "tensors": {
                key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in sorted(tensors.items())
            },
            "output": outputs[adapter],
        }
    (folder / name / "README.md").unlink(missing_ok=True)
    return {"base": kind, "dtype": dtype, "adapters": adapters}


def make_all(folder: Path) -> dict[str, Any]:
    """Write all cases and the manifest."""
    versions = {
        "peft": peft.__version__,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "python": platform.python_version(),
    }
    cases = {name: make(name, folder) for name in CASES}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(case, sort_keys=True)}" for name, case in cases.items())
    text = f'{{"versions": {json.dumps(versions)},\n "cases": {{\n{lines}\n}}}}\n'
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return {"versions": versions, "cases": cases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", type=Path, help="where to write; a temporary folder if left out")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="golden-"))
    folder.mkdir(parents=True, exist_ok=True)
    manifest = make_all(folder)
    print(f"{len(manifest['cases'])} cases written to {folder}")


if __name__ == "__main__":
    main()
