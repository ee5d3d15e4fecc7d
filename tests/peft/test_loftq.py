"""replace_lora_weights_loftq: factors of what quantising took from the weights, against PEFT's and numpy's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

import kilotune.peft as ours
from kilotune.errors import AdapterError, CheckpointError, ConfigError
from tests.peft.both import logits
from tests.peft_parity.oracle import quiet
from tests.support.models import tiny_llama

pytest.importorskip("bitsandbytes")
OPTIONS: dict[str, Any] = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}


def quantised(model: Any, kind: str = "nf4") -> Any:
    """All linear layers but the head in 4 bits, or in int8, on the CPU."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        if kind == "int8":
            made: Any = bnb.nn.Linear8bitLt(module.in_features, module.out_features, False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(module.in_features, module.out_features, False, quant_type=kind)
        made.load_state_dict(module.state_dict())
        around, _, own = name.rpartition(".")
        setattr(model.get_submodule(around), own, made.to("cpu"))
    return model


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def started(files: Path, kind: str = "nf4", **options: Any) -> Any:
    model = ours.get_peft_model(quantised(tiny_llama(), kind), ours.LoraConfig(**{**OPTIONS, **options}))
    ours.replace_lora_weights_loftq(model, files)
    return model


def lost(name: str) -> torch.Tensor:
    """What NF4 takes from a layer's weight, by bitsandbytes alone."""
    from bitsandbytes import functional

    weight = tiny_llama().get_submodule(name).weight.detach()
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found: torch.Tensor = weight - functional.dequantize_4bit(codes, state)
    return found


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_the_factors_are_those_of_pefts_decomposition(name: str, files: Path) -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    layer = started(files).get_base_model().get_submodule(name)
    wanted = _low_rank_decomposition(lost(name), reduced_rank=4)
    torch.testing.assert_close(layer.lora_A["default"].weight.detach(), wanted["R"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.lora_B["default"].weight.detach(), wanted["L"], atol=1e-5, rtol=1e-4)


class OnTheCpu(TorchFunctionMode):
    """PEFT's function asks for a GPU by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def test_the_state_is_that_of_pefts_function(files: Path) -> None:
    import peft

    with quiet(), OnTheCpu():
        base = quantised(tiny_llama())
        base.is_loaded_in_4bit = True  # by which PEFT tells such a model
        theirs = peft.get_peft_model(base, peft.LoraConfig(**OPTIONS))
        peft.replace_lora_weights_loftq(theirs, str(files / "model.safetensors"))
        wanted = peft.get_peft_model_state_dict(theirs)
    own = ours.get_peft_model_state_dict(started(files))
    assert set(own) == set(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(own[key], value, atol=1e-5, rtol=1e-4, msg=key)


@pytest.mark.parametrize("options", [{"lora_alpha": 8}, {"use_rslora": True}, {"r": 8, "rank_pattern": {"q_proj": 4}}])
def test_with_its_scale_it_is_the_nearest_matrix_of_that_rank(options: dict[str, Any], files: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    layer = started(files, **options).get_base_model().get_submodule(name)
    u, s, vh = np.linalg.svd(lost(name).double().numpy())
    nearest = (u[:, :4] * s[:4]) @ vh[:4]
    np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), nearest, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_model_comes_nearer_to_the_dense_one(kind: str, files: Path) -> None:
    dense = logits(tiny_llama())
    model = started(files, kind, target_modules="all-linear", r=8, lora_alpha=16)
    with model.disable_adapter():
        before = (logits(model) - dense).norm()
    assert (logits(model) - dense).norm() < 0.75 * before


def test_int8_layers_get_what_theirs_lost(files: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    layer = started(files, "int8", r=16, lora_alpha=16).get_base_model().get_submodule(name)
    codes, scales = layer.base_layer.weight.data, layer.base_layer.weight.SCB  # (out, in) int8, (out,)
    weight = tiny_llama().get_submodule(name).weight.detach()
    taken = weight.double() - codes.double() * scales.double().unsqueeze(-1) / 127
    assert taken.abs().max() > 1e-4
    torch.testing.assert_close(layer.get_delta_weight("default").detach().double(), taken, atol=1e-6, rtol=0)


def test_peft_makes_the_same_of_the_file(files: Path, tmp_path: Path) -> None:
    """Over a dense base that holds what NF4 left: bitsandbytes' own kernel on a CPU takes no weights this small."""
    import peft

    model = started(files)
    model.save_pretrained(str(tmp_path / "adapter"))
    base = tiny_llama()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data -= lost(name)
    with quiet():
        wanted = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")))
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_a_callback_may_put_a_layer_back(files: Path) -> None:
    model = ours.get_peft_model(quantised(tiny_llama()), ours.LoraConfig(**OPTIONS))
    start = {key: value.clone() for key, value in ours.get_peft_model_state_dict(model).items()}
    seen: list[str] = []

    def keep(asked: nn.Module, name: str) -> bool:
        assert asked is model
        seen.append(name)
        return "q_proj" in name

    ours.replace_lora_weights_loftq(model, files / "model.safetensors", callback=keep)
    assert sorted(seen) == sorted(
        f"model.layers.{at}.{n}" for at in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    )
    for key, value in ours.get_peft_model_state_dict(model).items():
        assert torch.equal(value, start[key]) == ("down_proj" in key), key


def test_shards_and_names_without_the_models_own_are_found(tmp_path: Path) -> None:
    whole = tiny_llama().model.state_dict()  # no "model." before the names
    names = sorted(whole)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({key: whole[key].contiguous() for key in part}, tmp_path / f"part-{number}.safetensors")
        index.update(dict.fromkeys(part, f"part-{number}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    name = "model.layers.0.self_attn.q_proj"
    layer = started(tmp_path, r=16, lora_alpha=16).get_base_model().get_submodule(name)
    torch.testing.assert_close(layer.get_delta_weight("default").detach(), lost(name), atol=1e-6, rtol=0)


def test_what_it_cannot_do_is_told(files: Path, tmp_path: Path) -> None:
    def fails(error: type[Exception], words: str, path: Any = files, dense: bool = False, **options: Any) -> None:
        base = tiny_llama() if dense else quantised(tiny_llama())
        model = ours.get_peft_model(base, ours.LoraConfig(**{**OPTIONS, **options}))
        before = {key: value.clone() for key, value in ours.get_peft_model_state_dict(model).items()}
        with pytest.raises(error, match=words):
            ours.replace_lora_weights_loftq(model, path)
        for key, value in ours.get_peft_model_state_dict(model).items():
            assert torch.equal(value, before[key])

    fails(AdapterError, "no layer over quantised weights", dense=True)
    fails(ConfigError, "plain LoRA", use_dora=True)
    fails(ConfigError, "plain LoRA", init_lora_weights="pissa")
    fails(ConfigError, "rank 17 of", r=17)
    fails(ConfigError, "scale 0", lora_alpha=0)
    fails(CheckpointError, "does not say where it came from", path=None)
    fails(CheckpointError, "neither model.safetensors", path=tmp_path)
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    fails(CheckpointError, r"(?s)weights that the base's files do not have.*q_proj", path=tmp_path)
    (tmp_path / "model.safetensors").write_text("no such thing")
    fails(CheckpointError, "no safetensors file", path=tmp_path)


def test_weights_of_another_base_are_told(tmp_path: Path) -> None:
    state = {
        key: value[:, :8].contiguous() if "q_proj" in key else value for key, value in tiny_llama().state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj.weight: \(16, 8\) in the base's file, \(16, 16\) in the model"):
        started(tmp_path)


def test_the_start_that_would_change_the_base_is_refused(tmp_path: Path) -> None:
    config = ours.LoftQConfig(loftq_bits=4)
    with pytest.raises(ConfigError, match="replace_lora_weights_loftq"):
        ours.LoraConfig(init_lora_weights="loftq", loftq_config=config)  # type: ignore[arg-type]
    model = ours.get_peft_model(tiny_llama(), ours.LoraConfig(**OPTIONS))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    said = {k: v for k, v in json.loads(path.read_text()).items() if k != "kilotune"}
    path.write_text(json.dumps({**said, "init_lora_weights": "loftq"}))
    with pytest.raises(ConfigError, match="beside the base that it had quantised"):
        ours.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
