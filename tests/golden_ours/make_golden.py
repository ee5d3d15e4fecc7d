"""Write golden files of our own: python tests/golden_ours/make_golden.py [folder]

Each case is a small adapter folder as kilotune wrote it, and its outputs in manifest.json, so that what was written
once is read for ever. The folders here stay as they are: those of ``0.1.0, first form`` were written before files that
PEFT is not to read got a peft_type of their own (commit b617c13). A case that a later form needs is added beside them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from kilotune import AdapterConfig, get_config, get_peft_model  # noqa: E402 - after the path
from tests.golden import net  # noqa: E402

FORM = "0.1.0, first form"


class Attending(nn.Module):
    """A linear layer, torch's attention, and a head; the rows of an input are one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).unsqueeze(0)
        return self.head(self.attn(h, h, h)[0]).squeeze(0)


def base(kind: str) -> nn.Module:
    """The base of a case, its values filled in by arithmetic."""
    if kind != "attention":
        return net.base(kind)
    made = Attending()
    with torch.no_grad():
        for salt, (_, parameter) in enumerate(sorted(made.named_parameters())):
            parameter.copy_(net.ramp(tuple(parameter.shape), salt, 0.5))
    return made.eval()


ALL = {"target_modules": ["first", "second", "third"]}
ATTENTION = {"target_modules": ["attn"]}
# name -> (the base, the method, its options)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vera": ("linear", "vera", {"r": 3, "projection_prng_key": 7, **ALL}),
    "vera_by_shape": ("linear", "vera", {"r": 3, "sharing": "shape", "exclude_modules": ["second"], **ALL}),
    "vera_stored": ("linear", "vera", {"r": 3, "save_projection": True, **ALL}),
    "vera_of_peft": ("linear", "vera", {"r": 3, "generator": "peft", **ALL}),
    "dvora": ("linear", "dvora", {"r": 3, **ALL}),
    "dvora_stored": ("linear", "dvora", {"r": 3, "save_projection": True, **ALL}),
    "unilora": ("linear", "unilora", {"r": 2, "theta_d_length": 9, **ALL}),
    "unilora_stored": ("linear", "unilora", {"r": 2, "theta_d_length": 9, "save_indices": True, **ALL}),
    "intrinsic": ("linear", "intrinsic", {"d": 12, "structure": "said", **ALL}),
    "loraxs": ("linear", "loraxs", {"r": 2, **ALL}),
    "loraxs_random": ("linear", "loraxs", {"r": 2, "start": "random", **ALL}),
    "bitfit": ("linear", "bitfit", {}),
    "bottleneck": ("linear", "bottleneck", {"width": 3, "placement": "pfeiffer", "target_modules": ["second"]}),
    "ia3": ("linear", "ia3", {"feedforward_modules": ["second"], **ALL}),
    "lora_fa": ("linear", "lora_fa", {"r": 2, **ALL}),
    "lora_attention": ("attention", "lora", {"r": 2, **ATTENTION}),
    "dora_attention": ("attention", "dora", {"r": 2, **ATTENTION}),
    "loraxs_attention": ("attention", "loraxs", {"r": 2, **ATTENTION}),
    "out_proj_alone": ("attention", "lora", {"r": 2, "target_modules": ["out_proj"]}),
}


def config_of(case: str) -> AdapterConfig:
    """The configuration of a case."""
    _, method, options = CASES[case]
    return get_config(method, **options)


def outputs(model: nn.Module) -> list[float]:
    """What a model makes of the fixed inputs."""
    with torch.no_grad():
        return [float(f"{value:.8g}") for value in model.eval()(net.inputs()).double().flatten().tolist()]


def make(case: str, folder: Path) -> dict[str, Any]:
    """Write one case below ``folder``; returns its entry of the manifest."""
    torch.manual_seed(0)  # of the starts, which are in the file
    model = get_peft_model(base(CASES[case][0]), config_of(case))
    net.fill(dict(model.adapter_parameters()))
    model.save_pretrained(folder / case)
    return {"form": FORM, "base": CASES[case][0], "output": outputs(model)}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="golden-"))
    cases = {case: make(case, folder) for case in CASES}
    lines = ",\n".join(f"  {json.dumps(case)}: {json.dumps(entry)}" for case, entry in cases.items())
    (folder / "manifest.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{len(cases)} cases written to {folder}")


if __name__ == "__main__":
    main()
