"""Where docs/diffusers.md says that diffusers reads a file otherwise: it does, or the page is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.loaders import lora_conversion_utils, lora_pipeline

from kilotune import load_diffusers_lora
from tests.diffusers_lora import files
from tests.diffusers_lora.files import Tensors, made, put, with_alphas
from tests.diffusers_lora.oracle import TINY_FLUX, difference, model, theirs, with_widths


def differ(pipeline: str, component: str, tensors: Tensors, folder: Path) -> tuple[float, float]:
    """(how far diffusers is from us, how far it is from the model without an adapter)."""
    path = put(folder / "lora.safetensors", tensors)
    other = theirs(pipeline, path)[component]
    name = {"unet": "unet", "text_encoder": "clip", "transformer": pipeline}[component]
    ours = load_diffusers_lora(path, {component: model(name)})[component]
    return difference(ours, other), difference(other, model(name))


@pytest.mark.parametrize("component, layers", [("unet", "attn"), ("text_encoder", "self_attn")])
def test_alphas_of_kohya_that_differ(component: str, layers: str, tmp_path: Path) -> None:
    """diffusers takes the commonest one, which is what this file says once its alphas are all that one."""
    name = "unet" if component == "unet" else "clip"
    tensors = made({component: model(name)}, files.kohya, lambda layer: layers in layer, ranks=[3])
    mixed, one = with_alphas(tensors, [2.0, 2.0, 9.0]), with_alphas(tensors, [2.0])
    assert differ("sd", component, mixed, tmp_path)[0] > 0.05
    both = [theirs("sd", put(tmp_path / f"{i}.safetensors", each))[component] for i, each in enumerate((mixed, one))]
    assert difference(*both) == 0


def test_kohyas_dora_is_left_out(tmp_path: Path) -> None:
    tensors = made({"unet": model("unet")}, files.kohya, lambda layer: layer.endswith("attn1.to_q"), ranks=[3])
    lengths = {
        key.replace("lora_up.weight", "dora_scale"): torch.ones(len(b), 1)
        for key, b in tensors.items()
        if key.endswith("up.weight")
    }
    off, effect = differ("sd", "unet", {**tensors, **lengths}, tmp_path)
    assert off > 0.01
    assert effect > 0.01


AROUND = [("img_in", 16, 4), ("time_in_in_layer", 16, 256), ("final_layer_linear", 4, 16)]


@pytest.mark.parametrize("layer, out, inn", AROUND)
def test_kohyas_flux_around_its_blocks(
    layer: str, out: int, inn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands before and behind the blocks is dropped."""
    name = "_convert_kohya_flux_lora_to_diffusers"
    monkeypatch.setattr(lora_pipeline, name, with_widths(getattr(lora_conversion_utils, name), TINY_FLUX))
    key = f"lora_unet_{layer}"
    tensors = {f"{key}.lora_down.weight": torch.eye(2, inn), f"{key}.lora_up.weight": torch.eye(out, 2)}
    off, effect = differ("flux", "transformer", {**tensors, f"{key}.alpha": torch.tensor(2.0)}, tmp_path)
    assert off > 0.01
    assert effect == 0


def test_kohyas_sd3_is_not_read_at_all(tmp_path: Path) -> None:
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.eye(48, 2)}
    off, effect = differ("sd3", "transformer", {**tensors, f"{key}.alpha": torch.tensor(1.0)}, tmp_path)
    assert off > 0.01
    assert effect == 0
