"""Files that cannot be read as they are: one error, with every fault and the nearest names, and nothing is changed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kilotune
from kilotune import CheckpointError, load_diffusers_lora
from tests.diffusers_lora import files
from tests.diffusers_lora.files import Tensors, made, put, with_alphas
from tests.diffusers_lora.oracle import model, models


def flux() -> Tensors:
    return made({"transformer": model("flux")}, files.peft_like, lambda name: ".to_" in name)


def refused(folder: Path, tensors: Tensors, own: dict[str, Any] | None = None, **more: Any) -> str:
    """The error's message; the models have no adapter afterwards."""
    said = more.pop("said", None)
    own = {"transformer": model("flux")} if own is None else own
    with pytest.raises(CheckpointError) as error:
        load_diffusers_lora(put(folder / "lora.safetensors", tensors, said), own, **more)
    for each in own.values():
        if isinstance(each, nn.Module):
            kilotune.injection.tree.check_base(each)
    return str(error.value)


FIRST = "transformer.transformer_blocks.0.attn.to_q"


def test_every_fault_is_listed_with_the_nearest_name(tmp_path: Path) -> None:
    tensors = flux()
    del tensors[f"{FIRST}.lora_B.weight"]
    tensors["transformer.transformer_blocks.0.attn.to_qq.lora_A.weight"] = torch.ones(2, 16)
    tensors["transformer.transformer_blocks.0.attn.to_qq.lora_B.weight"] = torch.ones(16, 2)
    tensors["transformer.transformer_blocks.1.attn.to_k.lora_B.weight"] = torch.ones(16, 9)
    tensors["transformer.transformer_blocks.1.attn.to_v.lora_A.weight"][0, 0] = torch.nan
    tensors["transformer.transformer_blocks.1.attn.to_q.alpha"] = torch.tensor([1.0, 2.0])
    tensors["transformer.x_embedder.hada_w1_a"] = torch.ones(2, 2)
    tensors["transformer.x_embedder.lora_A.wight"] = torch.ones(2, 2)
    tensors["text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"] = torch.ones(2, 12)
    message = refused(tmp_path, tensors)
    for words in (
        f"transformer: {FIRST}.lora_A.weight: its second factor is missing",
        "to_qq.lora_A.weight: the model has no such layer. Did you mean 'transformer_blocks.0.attn.to_q'?",
        " and (16, 9) are no factors (r, in) and (out, r)",
        "transformer_blocks.1.attn.to_v.lora_A.weight: values that are not finite",
        "transformer_blocks.1.attn.to_q.alpha: expected one number >= 0, got the shape (2,)",
        "transformer.x_embedder.hada_w1_a: this is of LoHa, which is not LoRA",
        "transformer.x_embedder.lora_A.wight: no tensor of LoRA. Did you mean",
        "text_encoder: the file has 1 of its layers, and it is not among the models given (transformer)",
    ):
        assert words in message, words
    assert message.count("\n  - ") == 8


def test_shapes_of_all_models_in_one_error(tmp_path: Path) -> None:
    own = models("sd")
    tensors = made(own, files.peft_like)
    places = {
        "unet.conv_in": torch.ones(3, 5, 3, 3),
        "text_encoder.encoder.layers.1.mlp.fc1": torch.ones(3, 13),
    }
    for place, value in places.items():
        tensors[f"{place}.lora_A.weight"] = value
        tensors[f"{place}.lora_B.weight"] = tensors[f"{place}.lora_B.weight"][:, :1].repeat_interleave(3, 1)
    message = refused(tmp_path, tensors, own)
    assert "unet: shape of conv_in.lora_A.weight: the model expects (3, 4, 3, 3), the file has (3, 5, 3, 3)" in message
    assert "text_encoder: shape of encoder.layers.1.mlp.fc1.lora_A.weight: the model expects (3, 12)" in message


def test_names_of_kohya_that_mean_nothing(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight": torch.ones(2, 16),
        "lora_unet_double_blocks_7_img_attn_qkv.lora_up.weight": torch.ones(48, 2),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 16),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(47, 2),
        "lora_unet_double_blocks_0_img_mlp_0.lora_mid.weight": torch.ones(2, 2, 3, 3),
    }
    message = refused(tmp_path, tensors)
    assert "double_blocks_7_img_attn_qkv.lora_down.weight: the model has no such layer. Did you mean" in message
    assert "qkv.lora_up.weight: 47 outputs, and transformer_blocks.0.attn.to_q + transformer_blocks.0" in message
    assert "lora_mid.weight: this is of a Tucker core, which is not LoRA" in message


def test_a_layer_that_is_there_twice(tmp_path: Path) -> None:
    """A file that was put together of two: in diffusers' names, and in those of the release."""
    own = {"transformer": model("flux")}
    released = {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 16),
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(48, 2),
    }
    message = refused(tmp_path, {**flux(), **released}, own)
    assert "'transformer_blocks.0.attn.to_q' is changed twice, also by" in message
    twice = {**flux(), f"{FIRST}.lora.down.weight": torch.ones(2, 16)}
    assert f"is there twice, also as {FIRST}.lora" in refused(tmp_path, twice, own)


def test_an_alpha_that_could_mean_two_things(tmp_path: Path) -> None:
    """kohya takes the rank for an alpha that is missing, diffusers the commonest one. Equal ones are read."""
    tensors = with_alphas(made({"transformer": model("flux")}, files.peft_like, ranks=[3]), [2.0], ".lora_A.weight")
    del tensors[f"{FIRST}.alpha"]
    message = refused(tmp_path, tensors)
    assert f"{FIRST}.lora_A.weight: no alpha, where other layers have one; kohya's trainer takes the rank 3" in message
    same = {key: torch.tensor(3.0) if key.endswith(".alpha") else value for key, value in tensors.items()}
    load_diffusers_lora(put(tmp_path / "same.safetensors", same), {"transformer": model("flux")})


def test_dora_in_some_layers_only(tmp_path: Path) -> None:
    tensors = {**flux(), f"{FIRST}.lora_magnitude_vector": torch.ones(16)}
    assert "transformer_blocks.0.attn.to_k: no magnitudes, where other layers have DoRA's" in refused(tmp_path, tensors)
    across = {**flux(), f"{FIRST}.dora_scale": torch.ones(1, 16)}
    assert "expected magnitudes of 16 outputs, got the shape (1, 16)" in refused(tmp_path, across)


def said(**more: Any) -> dict[str, Any]:
    options = {"r": 3, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "to_add_out"], **more}
    return {f"transformer.{key}": value for key, value in options.items()}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"r": 5}, "lora_A.weight: rank 3, and the header says 5"),
        (
            {"target_modules": ["to_q", "to_k", "to_v", "to_out.0", "to_add_out", "norm.linear"]},
            "norm.linear: missing in",
        ),
        (
            {"target_modules": ["to_q", "norm_out.linear"]},
            "norm_out.linear: missing in the file, whose header names it",
        ),
        ({"lora_bias": True}, "the header: lora_bias=True: unknown option"),
        ({"peft_type": "LOHA"}, "the header's peft_type is 'LOHA', expected 'LORA'"),
        ({"bias": "all"}, "the header has bias, which such a file has no tensors for"),
        ({"use_dora": True}, "the header has use_dora, which such a file has no tensors for"),
        ({"init_lora_weights": "pissa"}, "the header has init_lora_weights='pissa', so its factors are no change of"),
        ({"r": "many"}, "the header: r: expected a whole number"),
    ],
)
def test_a_header_that_does_not_fit(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    tensors = made({"transformer": model("flux")}, files.peft_like, lambda name: ".to_" in name, [3])
    assert words in refused(tmp_path, tensors, said=said(**options))


def test_a_header_and_an_alpha_that_contradict_each_other(tmp_path: Path) -> None:
    tensors = made({"transformer": model("flux")}, files.peft_like, lambda name: ".to_" in name, [3])
    tensors[f"{FIRST}.alpha"] = torch.tensor(7.0)
    assert "its alpha is 7, and the header says 2" in refused(tmp_path, tensors, said=said())
    tensors[f"{FIRST}.alpha"] = torch.tensor(2.0)
    load_diffusers_lora(put(tmp_path / "same.safetensors", tensors, said()), {"transformer": model("flux")})


def test_a_header_that_is_no_json(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for text, words in (("{", "is no JSON"), ("[]", "expected an object, got list")):
        save_file(flux(), tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=words):
            load_diffusers_lora(tmp_path, {"transformer": model("flux")})


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.bin"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file; others can run any code"):
        load_diffusers_lora(path, {"transformer": model("flux")})
    with pytest.raises(CheckpointError, match=r"expected pytorch_lora_weights.safetensors in it.*there: none"):
        load_diffusers_lora(tmp_path, {"transformer": model("flux")})
    with pytest.raises(CheckpointError, match="is not there"):
        load_diffusers_lora(tmp_path / "none.safetensors", {"transformer": model("flux")})


def test_what_is_left_out_may_be_anything(tmp_path: Path) -> None:
    other = {"text_encoder.a.lokr_w1": torch.ones(2, 2), "lora_te1_nothing.alpha": torch.ones(3)}
    message = refused(tmp_path, {**flux(), **other})
    assert "text_encoder.a.lokr_w1: this is of LoKr" in message
    path = tmp_path / "lora.safetensors"
    assert list(load_diffusers_lora(path, {"transformer": model("flux")}, leave_out=["text_encoder"])) == [
        "transformer"
    ]


def test_which_models(tmp_path: Path) -> None:
    path = put(tmp_path / "lora.safetensors", flux())
    with pytest.raises(kilotune.ConfigError, match="expected the models of a pipeline by their names"):
        load_diffusers_lora(path, {"scheduler": None})
    with pytest.raises(kilotune.ConfigError, match=r"no layers of 'transformr', only of transformer\. Did you mean"):
        load_diffusers_lora(path, {"transformer": model("flux")}, leave_out=["transformr"])
    with pytest.raises(kilotune.ConfigError, match="leave_out: expected a list"):
        load_diffusers_lora(path, {"transformer": model("flux")}, leave_out="transformer")
    assert "no layers of LoRA in it" in refused(tmp_path, flux(), leave_out=["transformer"])
    bare = {key.removeprefix("transformer."): value for key, value in flux().items()}
    message = refused(tmp_path, bare, models("flux"))
    assert "does not say of which model it is, and 2 models are given (text_encoder, transformer)" in message
    held = load_diffusers_lora(path, {"transformer": model("flux")})
    with pytest.raises(kilotune.AdapterError, match="'default' is taken in transformer"):
        load_diffusers_lora(path, held)
    base = held["transformer"].get_base_model()
    with pytest.raises(kilotune.UnsupportedError, match="has adapters of kilotune already"):
        load_diffusers_lora(path, {"transformer": base})


def test_an_alpha_below_zero(tmp_path: Path) -> None:
    message = refused(tmp_path, {**flux(), f"{FIRST}.alpha": torch.tensor(-1.0)})
    assert f"{FIRST}.alpha: expected one number >= 0, got -1" in message


def test_integers_are_no_factors(tmp_path: Path) -> None:
    whole: Tensor = torch.ones(3, 16, dtype=torch.int32)
    assert "expected floats, got torch.int32" in refused(tmp_path, {**flux(), f"{FIRST}.lora_A.weight": whole})
