"""What the layers of diffusers' models are called in the models' first releases, with "_" for dots, as kohya has it.

The UNet of Stable Diffusion counts its blocks through (``input_blocks_4_1_...``), Flux and SD3 hold the query, key and
value of an attention in one layer, and both have scale and shift of some norms the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple, final

__all__ = ["Meant", "of_transformer", "of_unet"]


@final
class Meant(NamedTuple):
    """The layers of diffusers that one layer of the release is, its outputs one after the other.

    swapped: its two halves of outputs change places.
    """

    names: tuple[str, ...]
    swapped: bool = False


# -- the UNet of Stable Diffusion ----------------------------------------------------------------------

OUTSIDE = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding.linear_1": "time_embed_0",
    "time_embedding.linear_2": "time_embed_2",
    "add_embedding.linear_1": "label_emb_0_0",
    "add_embedding.linear_2": "label_emb_0_2",
}
IN_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d{1,4})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,4})\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d{1,4})\.(.+)")


def of_unet(names: Collection[str]) -> dict[str, Meant]:
    """The names in the release of the layers of a UNet2DConditionModel -> their own; empty for other models."""
    if not any(name.startswith("down_blocks.") for name in names):
        return {}
    places = _places(names)
    found = {}
    for name in names:
        if name in OUTSIDE:
            found[OUTSIDE[name]] = Meant((name,))
        elif (block := BLOCK.fullmatch(name)) is not None:
            part, inner = block[3], block[5]
            place = places[block[1], int(block[2]), part, int(block[4])]
            found[f"{place}_{_inner(part, inner)}"] = Meant((name,))
        elif (middle := MIDDLE.fullmatch(name)) is not None:
            # A resnet, then pairs of an attention and a resnet.
            at = 2 * int(middle[2]) + (middle[1] == "attentions")
            found[f"middle_block_{at}_{_inner(middle[1], middle[3])}"] = Meant((name,))
    return found


def _inner(part: str, inner: str) -> str:
    if part == "resnets":
        return IN_RESNET.get(inner, inner.replace(".", "_"))
    return "op" if part == "downsamplers" else inner.replace(".", "_")


def _places(names: Collection[str]) -> dict[tuple[str, int, str, int], str]:
    """(``down_blocks`` or ``up_blocks``, which, what is in it, which) -> what the release calls it."""
    there = {(m[1], int(m[2]), m[3], int(m[4])) for name in names if (m := BLOCK.fullmatch(name))}
    places = {}
    for side, original, at in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for block in sorted({which for where, which, _, _ in there if where == side}):
            own = {(part, i) for where, which, part, i in there if (where, which) == (side, block)}
            for i in range(sum(part == "resnets" for part, _ in own)):
                places[side, block, "resnets", i] = f"{original}_{at}_0"
                places[side, block, "attentions", i] = f"{original}_{at}_1"
                # What makes the pictures larger stands behind a block's last.
                places[side, block, "upsamplers", 0] = f"{original}_{at}_{2 if ('attentions', i) in own else 1}"
                at += 1
            if ("downsamplers", 0) in own:  # a block of its own
                places[side, block, "downsamplers", 0] = f"{original}_{at}_0"
                at += 1
    return places


# -- Flux and SD3 --------------------------------------------------------------------------------------

Table = Mapping[str, tuple[str, ...]]
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
TIME = "time_text_embed.timestep_embedder.linear_"
TEXT = "time_text_embed.text_embedder.linear_"
GUIDANCE = "time_text_embed.guidance_embedder.linear_"
FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": f"{TIME}1",
    "time_in_out_layer": f"{TIME}2",
    "vector_in_in_layer": f"{TEXT}1",
    "vector_in_out_layer": f"{TEXT}2",
    "guidance_in_in_layer": f"{GUIDANCE}1",
    "guidance_in_out_layer": f"{GUIDANCE}2",
    "final_layer_linear": "proj_out",
}
FLUX_DOUBLE = {
    "img_attn_qkv": QKV,
    "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ADDED_QKV,
    "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}
FLUX_SINGLE = {
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
SD3 = {
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": f"{TIME}1",
    "t_embedder_mlp_2": f"{TIME}2",
    "y_embedder_mlp_0": f"{TEXT}1",
    "y_embedder_mlp_2": f"{TEXT}2",
    "final_layer_linear": "proj_out",
}
SD3_JOINT = {
    "x_block_attn_qkv": QKV,
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": tuple(name.replace("attn.", "attn2.") for name in QKV),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ADDED_QKV,
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
LAST = ("final_layer_adaLN_modulation_1", "norm_out.linear")
INDEX = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d{1,4})\.")


def of_transformer(names: Collection[str]) -> dict[str, Meant]:
    """The names in the release of the layers of Flux and SD3 -> their own; what a model has not is left out."""
    there = set(names)
    return {key: meant for key, meant in _transformer(there) if there.issuperset(meant.names)}


def _transformer(names: Collection[str]) -> Iterator[tuple[str, Meant]]:
    blocks = {(match[1], int(match[2])) for name in names if (match := INDEX.match(name))}
    # The last block of SD3 gives no context, so that its context's norm has a scale and a shift alone.
    ends = {i for kind, i in blocks if kind == "transformer_blocks" and not _has_context(names, i)}
    for kind, i in blocks:
        if kind == "single_transformer_blocks":
            yield from _block(f"single_blocks_{i}", f"{kind}.{i}", FLUX_SINGLE)
        else:
            yield from _block(f"double_blocks_{i}", f"{kind}.{i}", FLUX_DOUBLE)
            yield from _block(f"joint_blocks_{i}", f"{kind}.{i}", SD3_JOINT, i in ends)
    for key, name in (*FLUX.items(), *SD3.items()):
        yield key, Meant((name,))
    yield LAST[0], Meant((LAST[1],), swapped=True)


def _has_context(names: Collection[str], block: int) -> bool:
    return f"transformer_blocks.{block}.ff_context.net.2" in names


def _block(original: str, own: str, table: Table, last: bool = False) -> Iterator[tuple[str, Meant]]:
    for key, inner in table.items():
        swapped = last and inner == ("norm1_context.linear",)
        yield f"{original}_{key}", Meant(tuple(f"{own}.{name}" for name in inner), swapped)
