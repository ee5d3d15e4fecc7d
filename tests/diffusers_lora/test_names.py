"""What a name in a file means, by itself: of which model it is, and which of its layers."""

from __future__ import annotations

import pytest
import torch

from kilotune.diffusers_lora.keys import Part, Place, taken_apart
from kilotune.diffusers_lora.names import Layer, Names
from kilotune.diffusers_lora.original_names import Meant

ONE = torch.ones(1)


@pytest.mark.parametrize(
    "key, models, place, part",
    [
        ("unet.a.to_q.lora_A.weight", "unet", Place("unet", "a.to_q", False), Part.DOWN),
        ("unet.a.to_q.lora.up.weight", "unet", Place("unet", "a.to_q", False), Part.UP),
        ("unet.a.processor.to_q_lora.down.weight", "unet", Place("unet", "a.processor.to_q", False), Part.DOWN),
        ("text_encoder.a.fc1.lora_linear_layer.up.weight", "unet", Place("text_encoder", "a.fc1", False), Part.UP),
        ("lora_unet_a_to_q.alpha", "unet", Place("unet", "a_to_q", True), Part.ALPHA),
        ("lora_unet_a.dora_scale", "transformer", Place("transformer", "a", True), Part.MAGNITUDE),
        ("diffusion_model.a.b.lora_B.weight", "transformer", Place("transformer", "a_b", True), Part.UP),
        ("lora_te_a.lora_up.weight", "unet", Place("text_encoder", "a", True), Part.UP),
        ("lora_te2_a.lora_up.weight", "unet", Place("text_encoder_2", "a", True), Part.UP),
        ("lora_te3_a.lora_up.weight", "transformer text_encoder_2", Place("text_encoder_2", "a", True), Part.UP),
        ("lora_te3_a.lora_up.weight", "text_encoder_2 text_encoder_3", Place("text_encoder_3", "a", True), Part.UP),
        (
            "transformer_blocks.0.to_q.alpha",
            "transformer",
            Place("transformer", "transformer_blocks.0.to_q", False),
            Part.ALPHA,
        ),
        ("own.a.lora_A.weight", "own other", Place("own", "a", False), Part.DOWN),
    ],
)
def test_a_key_taken_apart(key: str, models: str, place: Place, part: Part) -> None:
    pieces = taken_apart({key: ONE}, models.split())
    assert pieces.faults == []
    assert {where: list(own) for where, own in pieces.layers.items()} == {place: [part]}
    assert pieces.layers[place][part].key == key


@pytest.mark.parametrize(
    "key", ["lora_A.weight", ".alpha", "unet.a.weight", "unet.a.lora_A", "lora_unet_a.lora_up.bias"]
)
def test_keys_that_are_none(key: str) -> None:
    assert len(taken_apart({key: ONE}, ["unet", "text_encoder"]).faults) == 1


def test_a_name_with_lines_that_could_be_one_of_two() -> None:
    names = Names({"a.b_c": Layer(1), "a.b.c": Layer(1), "text_model.d.e": Layer(1)})
    assert names.find("a_b_c", flat=True) is None
    assert names.fault("a_b_c", flat=True) == "can mean a.b_c or a.b.c"
    assert names.find("a.b_c", flat=False) == Meant(("a.b_c",))
    assert names.find("d_e", flat=True) == names.find("d.e", flat=False) == Meant(("text_model.d.e",))
    assert names.find("text_model_d_e", flat=True) == names.find("text_model.d.e", flat=False)
    assert names.find("nothing", flat=False) is names.find("nothing", flat=True) is None


def test_old_names_of_attention() -> None:
    unet = Names({f"down_blocks.0.attn1.{name}": Layer(1) for name in ("to_q", "to_out.0")})
    assert unet.find("down_blocks.0.attn1.processor.to_q", flat=False) == Meant(("down_blocks.0.attn1.to_q",))
    assert unet.find("down_blocks.0.attn1.processor.to_out", flat=False) == Meant(("down_blocks.0.attn1.to_out.0",))
    text = Names({f"encoder.{name}": Layer(1) for name in ("q_proj", "out_proj")})
    assert text.find("text_model.encoder.to_q", flat=False) == Meant(("encoder.q_proj",))
    assert text.find("text_model.encoder.to_out", flat=False) == Meant(("encoder.out_proj",))
