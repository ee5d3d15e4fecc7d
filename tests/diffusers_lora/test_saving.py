"""Files that are written here, read by diffusers and here again: equal outputs, and whole files or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import kilotune
from kilotune import LoraConfig, VeraConfig, get_peft_model, load_diffusers_lora, save_diffusers_lora
from kilotune.diffusers_lora.loading import read_diffusers_lora
from tests.diffusers_lora.oracle import PIPELINES, assert_same, difference, model, models, output, theirs

TARGETS: dict[str, Any] = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"],
    "transformer": ["to_q", "add_k_proj", "proj_out", "ff.net.2", "norm_out.linear"],
    "text_encoder": ["q_proj", "fc1"],
    "text_encoder_2": ["fc1", "fc2"],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 3, "lora_alpha": 2.5, "use_rslora": True},
    "patterns": {"r": 3, "lora_alpha": 4},
    "dora": {"r": 3, "lora_alpha": 6, "use_dora": True},
}


# An own rank and an own alpha of some layers.
PATTERNS: dict[str, dict[str, Any]] = {
    "unet": {"rank_pattern": {"to_q": 2, "attn1.to_k": 5}, "alpha_pattern": {"to_q": 9, "to_v": 1.5}},
    "transformer": {
        "rank_pattern": {"to_q": 2},
        "alpha_pattern": {"transformer_blocks.0.attn.to_q": 9, "proj_out": 1.5},
    },
    "text_encoder": {"rank_pattern": {"fc1": 4}, "alpha_pattern": {"q_proj": 2}},
    "text_encoder_2": {"alpha_pattern": {"layers.1.mlp.fc1": 2}},
}


def trained(pipeline: str, options: dict[str, Any], **more: Any) -> dict[str, kilotune.PeftModel]:
    """Adapters with random numbers in all models of a pipeline."""
    generator = torch.Generator().manual_seed(9)
    found = {}
    for name, each in models(pipeline).items():
        patterns = PATTERNS[name] if options is OPTIONS["patterns"] else {}
        config = LoraConfig(target_modules=TARGETS[name], **options, **patterns)
        found[name] = get_peft_model(each, config, **more).eval()
        with torch.no_grad():
            for _, parameter in sorted(found[name].adapter_parameters(), key=lambda item: item[0]):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


PAIRS = [
    pytest.param(pipeline, name, marks=[pytest.mark.heavy] if pipeline == "sdxl" else [])
    for pipeline in PIPELINES
    for name in OPTIONS
]


@pytest.mark.parametrize("pipeline, name", PAIRS)
def test_diffusers_reads_it_and_so_do_we(pipeline: str, name: str, tmp_path: Path) -> None:
    options = OPTIONS[name]
    ours = trained(pipeline, options)
    path = save_diffusers_lora(tmp_path, ours)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    again = load_diffusers_lora(tmp_path, models(pipeline))
    assert set(again) == set(ours)
    assert_same(again, ours, models(pipeline))
    other = theirs(pipeline, tmp_path)
    if "use_dora" in options:  # transformers 5.23 leaves the magnitudes of a text encoder out
        ours = {name: each for name, each in ours.items() if not name.startswith("text_encoder")}
    assert_same(ours, other, models(pipeline))


def test_what_came_from_kohya_goes_to_diffusers(tmp_path: Path) -> None:
    """Each layer's own rank and alpha stand in the header, under whole names."""
    from tests.diffusers_lora import files

    tensors = files.with_alphas(files.made(models("sd"), files.kohya))
    ours = load_diffusers_lora(files.put(tmp_path / "kohya.safetensors", tensors), models("sd"))
    path = save_diffusers_lora(tmp_path / "new" / "lora.safetensors", ours)
    assert_same(ours, theirs("sd", path), models("sd"))


def test_one_adapter_of_several_by_its_name(tmp_path: Path) -> None:
    ours = trained("flux", {"r": 2}, adapter_name="mine")
    for each in ours.values():
        each.add_adapter("other", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    save_diffusers_lora(tmp_path / "mine.safetensors", ours, "mine")
    save_diffusers_lora(tmp_path / "other.safetensors", {"transformer": ours["transformer"]}, "other")
    assert_same(ours, theirs("flux", tmp_path / "mine.safetensors"), models("flux"))
    ours["transformer"].set_adapter("other")
    other = theirs("flux", tmp_path / "other.safetensors")
    assert difference(ours["transformer"], other["transformer"]) < 2e-6
    assert difference(other["text_encoder"], model("clip")) == 0


def test_the_same_adapters_give_the_same_bytes(tmp_path: Path) -> None:
    ours = trained("sd", OPTIONS["patterns"])
    one, two = (save_diffusers_lora(tmp_path / name, ours) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    (tmp_path / "plain").touch()
    assert one.stat().st_mode == (tmp_path / "plain").stat().st_mode
    back = load_diffusers_lora(one, models("sd"))
    assert output(back["unet"]).shape == output(ours["unet"]).shape


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = save_diffusers_lora(tmp_path, trained("flux", {"r": 2}))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(kilotune.CheckpointError, match="is damaged"):
        load_diffusers_lora(path, models("flux"))


def test_it_says_of_which_base_it_is(tmp_path: Path) -> None:
    save_diffusers_lora(tmp_path, trained("flux", {"r": 2}))
    other = model("flux")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    own = {"transformer": other, "text_encoder": model("clip")}
    with pytest.warns(kilotune.OtherBaseWarning, match="has other weights"):
        load_diffusers_lora(tmp_path, own)


def test_what_has_no_place_is_refused_and_nothing_written(tmp_path: Path) -> None:
    vera = get_peft_model(model("flux"), VeraConfig(r=4, target_modules=["to_q"]))
    biased = get_peft_model(model("clip"), LoraConfig(target_modules=["q_proj"], bias="all"))
    head = get_peft_model(
        model("clip projection"), LoraConfig(target_modules=["q_proj"], modules_to_save=["text_projection"])
    )
    parts = {"transformer": vera, "text_encoder": biased, "text_encoder_2": head}
    with pytest.raises(kilotune.UnsupportedError) as error:
        save_diffusers_lora(tmp_path, parts)
    head.installed("default").marks["kilotune_stands_on"] = "{}"
    with pytest.raises(kilotune.UnsupportedError, match="a shared adapter that it stands on"):
        save_diffusers_lora(tmp_path, {"text_encoder_2": head})
    for words in ("transformer: vera is not LoRA", "text_encoder: bias='all'", "text_encoder_2: modules_to_save"):
        assert words in str(error.value)
    with pytest.raises(kilotune.ConfigError, match=r"get_peft_model gives, got transformers.*CLIPTextModel"):
        save_diffusers_lora(tmp_path, {"text_encoder": model("clip")})  # type: ignore[dict-item]
    with pytest.raises(kilotune.ConfigError, match="'a.b': expected the name of a model"):
        save_diffusers_lora(tmp_path, {"a.b": biased})
    with pytest.raises(kilotune.ConfigError, match="components: expected the models"):
        save_diffusers_lora(tmp_path, {})
    with pytest.raises(kilotune.AdapterError, match="nobody"):
        save_diffusers_lora(tmp_path, {"text_encoder": biased}, "nobody")
    assert list(tmp_path.iterdir()) == []


def test_an_exact_lora_of_vera_is_written(tmp_path: Path) -> None:
    vera = get_peft_model(model("flux"), VeraConfig(r=4, target_modules=["to_q"]))
    with torch.no_grad():
        for _, parameter in vera.adapter_parameters():
            parameter += 0.5
    kilotune.convert.to_lora(vera).save(tmp_path / "lora")
    lora = kilotune.PeftModel.from_pretrained(model("flux"), tmp_path / "lora")
    save_diffusers_lora(tmp_path, {"transformer": lora})
    assert_same({"transformer": vera}, theirs("flux", tmp_path), models("flux"))


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained("flux", {"r": 2})
    path = save_diffusers_lora(tmp_path, first)
    before = path.read_bytes()

    def full(tensors: object, place: Path, metadata: object) -> None:
        place.write_bytes(b"a part")
        raise OSError("no space left")

    monkeypatch.setattr("kilotune.diffusers_lora.saving.save_file", full)
    with pytest.raises(kilotune.CheckpointError, match="no space left"):
        save_diffusers_lora(tmp_path, trained("flux", {"r": 3}))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_header_is_what_diffusers_writes(tmp_path: Path) -> None:
    path = save_diffusers_lora(tmp_path, trained("sd", OPTIONS["alpha"]))
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (said["unet.r"], said["unet.lora_alpha"], said["text_encoder.lora_alpha"]) == (3, 7, 7)
    keys = set(load_file(path))
    assert "unet.conv_in.lora_A.weight" not in keys
    assert "unet.down_blocks.0.resnets.0.conv1.lora_A.weight" in keys
    assert "text_encoder.encoder.layers.0.mlp.fc1.lora_linear_layer.down.weight" in keys


def test_a_store_takes_each_models_part(tmp_path: Path) -> None:
    """What is read is an adapter file like any other."""
    ours = trained("flux", OPTIONS["patterns"])
    files = read_diffusers_lora(save_diffusers_lora(tmp_path, ours), models("flux"))
    loaded = kilotune.PeftModel.from_pretrained(model("flux"), files["transformer"], "again")
    assert difference(loaded, ours["transformer"]) < 2e-6
    loaded.save_pretrained(tmp_path / "peft")
    assert (tmp_path / "peft" / "again" / "adapter_config.json").is_file()
