"""Flux, SD3 and the UNet of SDXL as they were released: names and shapes of their layers, written down here anew."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.loaders import single_file_utils
from torch import Tensor

from tests.diffusers_lora.oracle import with_widths

Shapes = dict[str, tuple[int, ...]]
D, HEAD, MLP, TEXT, POOLED, LATENT = 16, 8, 64, 12, 10, 4  # the sizes of the tiny models


def flux_layers() -> Shapes:
    found: Shapes = {"img_in": (D, LATENT), "txt_in": (D, TEXT)}
    for name, inn in (("time_in", 256), ("vector_in", POOLED), ("guidance_in", 256)):
        found |= {f"{name}.in_layer": (D, inn), f"{name}.out_layer": (D, D)}
    for i in range(2):
        for side in ("img", "txt"):
            start = f"double_blocks.{i}.{side}"
            found |= {f"{start}_mod.lin": (6 * D, D), f"{start}_attn.qkv": (3 * D, D), f"{start}_attn.proj": (D, D)}
            found |= {f"{start}_mlp.0": (MLP, D), f"{start}_mlp.2": (D, MLP)}
        start = f"single_blocks.{i}"
        found |= {f"{start}.linear1": (3 * D + MLP, D), f"{start}.linear2": (D, D + MLP)}
        found |= {f"{start}.modulation.lin": (3 * D, D)}
    return found | {"final_layer.linear": (LATENT, D), "final_layer.adaLN_modulation.1": (2 * D, D)}


def sd3_layers() -> Shapes:
    found: Shapes = {"x_embedder.proj": (D, LATENT, 2, 2), "context_embedder": (D, TEXT)}
    for name, inn in (("t_embedder", 256), ("y_embedder", POOLED)):
        found |= {f"{name}.mlp.0": (D, inn), f"{name}.mlp.2": (D, D)}
    for i in range(2):
        x, context = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        for start in (x, context):
            found |= {f"{start}.attn.qkv": (3 * D, D), f"{start}.attn.proj": (D, D)}
            found |= {f"{start}.mlp.fc1": (MLP, D), f"{start}.mlp.fc2": (D, MLP)}
        found |= {f"{x}.adaLN_modulation.1": (6 * D, D), f"{context}.adaLN_modulation.1": (6 * D, D)}
        if i == 0:
            found |= {f"{x}.attn2.qkv": (3 * D, D), f"{x}.attn2.proj": (D, D), f"{x}.adaLN_modulation.1": (9 * D, D)}
        else:  # the last block's context goes nowhere
            for gone in ("attn.proj", "mlp.fc1", "mlp.fc2"):
                del found[f"{context}.{gone}"]
            found[f"{context}.adaLN_modulation.1"] = (2 * D, D)
    return found | {"final_layer.linear": (4 * LATENT, D), "final_layer.adaLN_modulation.1": (2 * D, D)}


FLUX_NORMS = [
    f"double_blocks.{i}.{s}_attn.norm.{k}_norm.scale" for i in (0, 1) for s in ("img", "txt") for k in ("query", "key")
]
FLUX_NORMS += [f"single_blocks.{i}.norm.{k}_norm.scale" for i in (0, 1) for k in ("query", "key")]
SD3_NORMS = [f"joint_blocks.{i}.{s}_block.attn.ln_{k}.weight" for i in (0, 1) for s in ("x", "context") for k in "qk"]
SD3_NORMS += [f"joint_blocks.0.x_block.attn2.ln_{k}.weight" for k in "qk"]


def checkpoint(layers: Shapes, norms: list[str]) -> dict[str, Tensor]:
    """A released model's random weights."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, shape in layers.items():
        found[f"{name}.weight"] = torch.randn(shape, generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
        found[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)
    return {**found, **{name: torch.ones(HEAD) for name in norms}}


def flux_in_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own reading of a released Flux."""
    read = with_widths(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, {3072: D})
    found: dict[str, Tensor] = read(dict(weights))
    return found


def sd3_in_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own reading of a released SD3."""
    places = torch.zeros(1, 256, D)
    found: dict[str, Tensor] = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        {**weights, "pos_embed": places}
    )
    return {key: value for key, value in found.items() if key != "pos_embed.pos_embed"}


# The UNet of SDXL: diffusers' blocks -> the released ones.
SDXL = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0": "input_blocks.3.0",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "down_blocks.1.resnets.1": "input_blocks.5.0",
    "down_blocks.1.attentions.1": "input_blocks.5.1",
    "down_blocks.1.downsamplers.0": "input_blocks.6.0",
    "down_blocks.2.resnets.0": "input_blocks.7.0",
    "down_blocks.2.attentions.0": "input_blocks.7.1",
    "down_blocks.2.resnets.1": "input_blocks.8.0",
    "down_blocks.2.attentions.1": "input_blocks.8.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.resnets.2": "output_blocks.2.0",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.0.upsamplers.0": "output_blocks.2.2",
    "up_blocks.1.resnets.0": "output_blocks.3.0",
    "up_blocks.1.attentions.0": "output_blocks.3.1",
    "up_blocks.1.resnets.1": "output_blocks.4.0",
    "up_blocks.1.attentions.1": "output_blocks.4.1",
    "up_blocks.1.resnets.2": "output_blocks.5.0",
    "up_blocks.1.attentions.2": "output_blocks.5.1",
    "up_blocks.1.upsamplers.0": "output_blocks.5.2",
    "up_blocks.2.resnets.0": "output_blocks.6.0",
    "up_blocks.2.resnets.1": "output_blocks.7.0",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
}
IN_RESNETS = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
AROUND = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def in_sdxl(layer: str) -> str:
    """The released name of a layer of SDXL's UNet."""
    if layer in AROUND:
        return AROUND[layer]
    block, name = next((b, layer.removeprefix(f"{b}.")) for b in SDXL if layer.startswith(f"{b}."))
    inner = "op" if "downsamplers" in block else IN_RESNETS.get(name, name)
    return f"{SDXL[block]}.{inner}"
