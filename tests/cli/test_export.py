"""``kilotune export``: other tools find in its files what the adapter does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    T5Config,
    ViTConfig,
)
from transformers.modeling_gguf_pytorch_utils import GPT2TensorProcessor, LlamaTensorProcessor

from kilotune import LoraConfig, PeftModel, VeraConfig, get_config, get_peft_model
from tests.support.cli_helpers import as_json, bert, distance, error, gpt2, kilotune, llama, logits, saved, shake

CLOSE = 2e-6
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# llama.cpp's names of the linear layers of a block; its converter writes these for each of the architectures.
LLAMA_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_BLOCK = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def adapter(folder: Path, model: Any, config: Any, size: float = 0.3) -> PeftModel:
    """Write base and adapter; returns the adapted model."""
    saved(model, folder / "base")
    adapted = shake(get_peft_model(model, config), size)
    adapted.save_pretrained(folder / "adapter")
    return adapted


def words(folder: Path, to: str, out: str) -> tuple[object, ...]:
    return ("export", folder / "adapter", "--base", folder / "base", "--to", to, "--out", folder / out)


def changes(path: Path) -> dict[str, Tensor]:
    """What llama.cpp adds to each tensor: alpha / r * lora_b lora_a, with r the second size of lora_b."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    held = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in held}
    made = {}
    for name in names:
        a, b = torch.tensor(held[f"{name}.lora_a"]).double(), torch.tensor(held[f"{name}.lora_b"]).double()
        scale = alpha / b.shape[1] if alpha else 1.0
        made[name] = scale * (b @ a.T if name == "token_embd.weight" else b @ a)
    assert len(held) == 2 * len(made)
    return made


def weight_changes(adapted: PeftModel) -> dict[str, Tensor]:
    """Module -> what merging adds to its weight, in the weight's own layout: merged less plain, in float64."""
    adapted.double()
    plain = {name: m.base_layer.weight.detach().clone() for name, m in adapted.adapted_layers().items()}
    merged = adapted.merge_and_unload()
    return {name: merged.get_submodule(name).weight.detach() - before for name, before in plain.items()}


def metadata(path: Path) -> dict[str, Any]:
    return {name: f.contents() for name, f in gguf.GGUFReader(path).fields.items() if not name.startswith("GGUF.")}


# -- GGUF ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
        LoraConfig(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules="all-linear"),
        LoraConfig(r=4, lora_alpha=0, target_modules="all-linear"),
        VeraConfig(r=8, target_modules="all-linear"),
        get_config("loraxs", r=4, target_modules=["q_proj", "v_proj"]),
        get_config("unilora", r=4, target_modules=["q_proj", "k_proj"]),
    ],
    ids=["lora", "mixed-ranks", "no-change", "vera", "loraxs", "unilora"],
)
def test_gguf_of_a_llama_is_the_change_of_each_weight(tmp_path: Path, config: Any) -> None:
    """The rows of q and k are brought back by transformers' own reader of GGUF. Heads of 8, whose order is no swap."""
    adapted = adapter(tmp_path, llama(hidden_size=32), config)
    done = as_json(*words(tmp_path, "gguf", "a.gguf"))
    found, want = changes(tmp_path / "a.gguf"), weight_changes(adapted)
    back = LlamaTensorProcessor({"num_attention_heads": 4, "num_key_value_heads": 2})
    assert len(found) == len(want) == done["layers"]
    for name, change in want.items():
        _, _, block, rest = name.split(".", 3)
        place = f"blk.{block}.{LLAMA_BLOCK[rest]}.weight"
        got = torch.tensor(back.process(found.pop(place).numpy(), place).weights)
        assert (got - change).abs().max() <= 2e-6 * max(float(change.abs().max()), 1e-30), name
    assert found == {}
    assert done["architecture"] == "llama"
    about = metadata(tmp_path / "a.gguf")
    assert about["general.architecture"] == "llama"
    assert about["general.type"] == "adapter"
    assert about["adapter.type"] == "lora"
    assert about["general.name"] == "adapter"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "adapter", "base"]


def test_what_is_no_lora_has_its_rank_for_an_alpha(tmp_path: Path) -> None:
    adapter(tmp_path, llama(), VeraConfig(r=8))
    assert as_json(*words(tmp_path, "gguf", "a.gguf"))["alpha"] == 8.0


def test_the_order_of_rows_matters(tmp_path: Path) -> None:
    """The test above can fail: the change of q, as it stands in the file, is not that of transformers' weight."""
    adapted = adapter(tmp_path, llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    assert kilotune(*words(tmp_path, "gguf", "a.gguf")).exit_code == 0
    got = changes(tmp_path / "a.gguf")["blk.0.attn_q.weight"]
    want = weight_changes(adapted)["model.layers.0.self_attn.q_proj"]
    assert distance(want, got) > 0.1
    assert torch.allclose(got.sort(dim=0).values, want.sort(dim=0).values, atol=1e-6)


def test_a_lora_keeps_its_numbers_and_its_alpha(tmp_path: Path) -> None:
    adapter(tmp_path, llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj"]))
    done = as_json(*words(tmp_path, "gguf", "a.gguf"))
    assert (done["rank"], done["alpha"]) == (4, 6.0)
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors:
        block, end = tensor.name.split(".")[1], tensor.name[-1].upper()
        want = held[f"base_model.model.model.layers.{block}.self_attn.v_proj.lora_{end}.weight"]
        assert np.array_equal(tensor.data, want.numpy())  # bit for bit


def test_gguf_of_a_gpt2_is_the_change_of_each_weight(tmp_path: Path) -> None:
    adapted = adapter(tmp_path, gpt2(), VeraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"]))
    assert as_json(*words(tmp_path, "gguf", "a.gguf"))["architecture"] == "gpt2"
    found, back = changes(tmp_path / "a.gguf"), GPT2TensorProcessor({})
    for name, change in weight_changes(adapted).items():
        _, _, block, rest = name.split(".", 3)
        place = f"blk.{block}.{GPT2_BLOCK[rest]}.weight"
        got = torch.tensor(back.process(found.pop(place).numpy(), place).weights)  # to Conv1D's (in, out)
        assert distance(change, got) < CLOSE, name
    assert found == {}


def test_gguf_of_a_gpt_neox_has_queries_keys_and_values_apart(tmp_path: Path) -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**sizes))
    adapted = adapter(tmp_path, model, LoraConfig(r=4, target_modules=["query_key_value", "dense"]))
    assert as_json(*words(tmp_path, "gguf", "a.gguf"))["architecture"] == "gptneox"
    found, want = changes(tmp_path / "a.gguf"), weight_changes(adapted)
    x = torch.randn(16, dtype=torch.float64)
    ours = want["gpt_neox.layers.1.attention.query_key_value"] @ x
    q, k, v = ours.view(4, 12).chunk(3, dim=-1)  # as transformers' attention takes it apart, head by head
    theirs = found["blk.1.attn_qkv.weight"] @ x
    assert torch.allclose(theirs, torch.cat([q.reshape(-1), k.reshape(-1), v.reshape(-1)]), atol=1e-5)
    assert distance(want["gpt_neox.layers.0.attention.dense"], found["blk.0.attn_output.weight"]) < CLOSE


@pytest.mark.parametrize(
    ("kind", "architecture", "block"),
    [
        ("mistral", "llama", LLAMA_BLOCK),
        ("qwen2", "qwen2", LLAMA_BLOCK),
        ("qwen3", "qwen3", LLAMA_BLOCK),
        ("gemma", "gemma", LLAMA_BLOCK),
        ("gemma2", "gemma2", LLAMA_BLOCK),
        ("gemma3_text", "gemma3", LLAMA_BLOCK),
        (
            "phi3",
            "phi3",
            {
                "self_attn.qkv_proj": "attn_qkv",
                "self_attn.o_proj": "attn_output",
                "mlp.gate_up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
            },
        ),
        (
            "starcoder2",
            "starcoder2",
            {name: LLAMA_BLOCK[name] for name in list(LLAMA_BLOCK)[:4]}
            | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        ),
        ("gpt_bigcode", "starcoder", GPT2_BLOCK),
    ],
)
def test_names_of_every_architecture(tmp_path: Path, kind: str, architecture: str, block: dict[str, str]) -> None:
    torch.manual_seed(0)
    sizes = SIZES if kind != "gpt_bigcode" else {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4}
    extra = {"head_dim": 4} if kind.startswith(("gemma", "qwen3")) else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **extra))
    adapted = adapter(tmp_path, model, LoraConfig(r=4, target_modules="all-linear"))
    done = as_json(*words(tmp_path, "gguf", "a.gguf"))
    assert done["architecture"] == architecture
    found, want = changes(tmp_path / "a.gguf"), weight_changes(adapted)
    assert set(found) == {f"blk.{i}.{name}.weight" for i in range(2) for name in block.values()}
    for name, change in want.items():
        _, _, number, rest = name.split(".", 3)
        got = found[f"blk.{number}.{block[rest]}.weight"]
        assert got.shape == change.shape
        if architecture != "llama" or rest not in ("self_attn.q_proj", "self_attn.k_proj"):
            assert distance(change, got) < CLOSE, name


def test_gguf_of_an_embedding_and_an_output_that_are_two(tmp_path: Path) -> None:
    adapted = adapter(tmp_path, llama(), LoraConfig(r=4, lora_alpha=2, target_modules=["embed_tokens", "lm_head"]))
    done = as_json(*words(tmp_path, "gguf", "a.gguf"))
    shapes = {t.name: tuple(t.data.shape) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    # llama.cpp looks rows up in lora_a of the embedding, one a token.
    assert shapes["token_embd.weight.lora_a"] == (40, 4)
    assert shapes["token_embd.weight.lora_b"] == (16, 4)
    found, want = changes(tmp_path / "a.gguf"), weight_changes(adapted)
    assert distance(want["model.embed_tokens"], found["token_embd.weight"].T) < CLOSE
    assert distance(want["lm_head"], found["output.weight"]) < CLOSE
    assert done["layers"] == 2


def test_gguf_in_16_bits_and_in_a_smaller_rank(tmp_path: Path) -> None:
    adapter(tmp_path, llama(), VeraConfig(r=8, target_modules=["v_proj"]))
    assert kilotune(*words(tmp_path, "gguf", "a.gguf")).exit_code == 0
    whole = changes(tmp_path / "a.gguf")
    for dtype, exact in (("float16", 2e-3), ("bfloat16", 2e-2)):
        done = as_json(*words(tmp_path, "gguf", f"{dtype}.gguf"), "--dtype", dtype)
        assert done["dtype"] == dtype
        narrow = changes(tmp_path / f"{dtype}.gguf")
        assert all(0 < distance(whole[name], narrow[name]) < exact for name in whole)
    done = as_json(*words(tmp_path, "gguf", "small.gguf"), "--rank", 3)
    small = changes(tmp_path / "small.gguf")
    for name, change in whole.items():
        layer = f"model.layers.{name.split('.')[1]}.self_attn.v_proj"
        values = torch.linalg.svdvals(change)  # Eckart and Young: what the best approximation leaves
        assert float((change - small[name]).norm()) == pytest.approx(float(values[3:].norm()), rel=1e-4)
        assert done["errors"][layer] == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-4)
    said = kilotune(*words(tmp_path, "gguf", "again.gguf"), "--rank", 3).stdout
    assert f"relative error is {max(done['errors'].values()):.4f}" in said


def test_gguf_of_a_headless_model(tmp_path: Path) -> None:
    adapted = adapter(tmp_path, llama().model, LoraConfig(r=4, target_modules=["v_proj"]))
    assert kilotune(*words(tmp_path, "gguf", "a.gguf")).exit_code == 0
    assert (
        distance(
            weight_changes(adapted)["layers.1.self_attn.v_proj"], changes(tmp_path / "a.gguf")["blk.1.attn_v.weight"]
        )
        < CLOSE
    )


# -- what cannot be exported -----------------------------------------------------------------------


def t5() -> Any:
    return T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (bert, LoraConfig(r=4), "model_type 'bert'"),
        (llama, get_config("dora", r=4), "dora: makes no change of low rank"),
        (llama, get_config("dvora", r=4), "dora: makes no change of low rank"),
        (llama, get_config("ia3"), "ia3: makes no change of low rank"),
        (llama, get_config("intrinsic", d=20, target_modules=["q_proj"]), "intrinsic: makes no change of low rank"),
        (gpt2, get_config("bitfit"), "bitfit: makes no change of low rank"),
        (llama, get_config("bottleneck"), "it can be neither a LoRA nor merged"),
        (gpt2, LoraConfig(r=4, bias="lora_only"), "c_attn.bias: is trained, and a GGUF LoRA holds no biases"),
        (gpt2, LoraConfig(r=4, target_modules=["lm_head"]), "lm_head: input and output share this weight"),
        (gpt2, LoraConfig(r=4, target_modules=["wte"]), "transformer.wte: input and output share this weight"),
        (gpt2, LoraConfig(r=4, target_modules=["wpe"]), "reads the table of positions without adapters"),
        (llama, LoraConfig(r=4, modules_to_save=["lm_head"]), "lm_head: is trained whole"),
    ],
    ids=[
        "bert",
        "dora",
        "dvora",
        "ia3",
        "intrinsic",
        "bitfit",
        "bottleneck",
        "bias",
        "tied-out",
        "tied-in",
        "positions",
        "whole",
    ],
)
def test_what_gguf_cannot_hold_is_refused_with_the_reason(tmp_path: Path, model: Any, config: Any, reason: str) -> None:
    adapter(tmp_path, model(), config)
    assert reason in error(*words(tmp_path, "gguf", "a.gguf"))
    assert not (tmp_path / "a.gguf").exists()


def test_a_model_that_llama_cpp_has_otherwise(tmp_path: Path) -> None:
    config = GPTBigCodeConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=4, multi_query=False)
    adapter(tmp_path, AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules=["c_fc"]))
    assert "with multi_query only" in error(*words(tmp_path, "gguf", "a.gguf"))


def test_all_reasons_are_told_together(tmp_path: Path) -> None:
    adapter(tmp_path, gpt2(), LoraConfig(r=4, target_modules=["lm_head"], modules_to_save=["ln_f"]))
    text = error(*words(tmp_path, "gguf", "a.gguf"))
    assert "ln_f: is trained whole" in text
    assert "lm_head: input and output share this weight" in text
    assert "--to merged can" in text


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--to", "gguf", "--out", "a.bin"), "whose name ends in .gguf, such as a.bin.gguf"),
        (("--to", "gguf", "--out", "there.gguf"), "the output there.gguf is there; take another name, or give --force"),
        (("--to", "gguf", "--out", "folder.gguf"), "the output folder.gguf is a folder"),
        (("--to", "gguf", "--out", "there.gguf/a.gguf"), "cannot write there.gguf/a.gguf"),
        (("--to", "gguf", "--out", "a.gguf", "--dtype", "flot16"), "Did you mean 'float16'?"),
        (("--to", "gguf", "--out", "a.gguf", "--rank", "8"), "rank: expected a whole number from 1 to 7"),
        (("--to", "gguf", "--out", "a.gguf", "--rank", "0"), "rank: expected a whole number from 1 to 7"),
        (("--to", "lora", "--out", "a", "--dtype", "float16"), "--dtype: is for --to merged and --to gguf"),
        (("--to", "merged", "--out", "a", "--rank", "2"), "--rank: is for --to lora and --to gguf"),
        (("--to", "lora", "--out", "base"), "the output base is, or contains"),
        (("--to", "onnx", "--out", "a"), "'onnx' is not one of 'merged', 'lora', 'gguf'"),
        (("--to", "lora", "--out", "a", "--base", "other"), "does not fit this"),
        (("--to", "gguf", "--out", "a.gguf", "--base", "nowhere"), "no file, folder or built-in model"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], text: str) -> None:
    monkeypatch.chdir(tmp_path)
    adapter(Path(), llama(), VeraConfig(r=8))
    saved(llama(hidden_size=32), Path("other"))
    Path("there.gguf").write_text("mine")
    Path("folder.gguf").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    base = () if "--base" in more else ("--base", "base")
    assert text in " ".join(error("export", "adapter", *base, *more).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert Path("there.gguf").read_text() == "mine"


def test_force_replaces_a_file(tmp_path: Path) -> None:
    adapter(tmp_path, llama(), VeraConfig(r=8))
    (tmp_path / "a.gguf").write_text("mine")
    assert kilotune(*words(tmp_path, "gguf", "a.gguf"), "--force").exit_code == 0
    assert metadata(tmp_path / "a.gguf")["general.type"] == "adapter"


def test_values_that_are_no_numbers_and_values_that_16_bits_cannot_hold(tmp_path: Path) -> None:
    adapted = adapter(tmp_path, llama(), LoraConfig(r=4, target_modules=["v_proj"]))
    layer = adapted.adapted_layers()["model.layers.1.self_attn.v_proj"].slot("default")
    with torch.no_grad():
        layer.lora_B[0, 0] = 1e6
    adapted.save_pretrained(tmp_path / "adapter")
    assert "blk.1.attn_v.weight.lora_b" in error(*words(tmp_path, "gguf", "a.gguf"), "--dtype", "float16")
    assert kilotune(*words(tmp_path, "gguf", "a.gguf"), "--dtype", "bfloat16").exit_code == 0
    with torch.no_grad():
        layer.lora_B[0, 0] = float("nan")
    adapted.save_pretrained(tmp_path / "adapter")
    assert "model.layers.1.self_attn.v_proj" in error(*words(tmp_path, "gguf", "b.gguf"))
    assert not (tmp_path / "b.gguf").exists()


def test_without_the_package_gguf_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter(tmp_path, llama(), VeraConfig(r=8))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'kilotune[export]'" in error(*words(tmp_path, "gguf", "a.gguf"))


# -- LoRA folders and merged models ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, VeraConfig(r=8, target_modules="all-linear")),
        (llama, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear")),
        (gpt2, LoraConfig(r=4, bias="lora_only", rank_pattern={"h.0.attn.c_attn": 2})),
        (bert, get_config("loraxs", r=4, target_modules=["query", "value"])),
    ],
    ids=["vera", "lora", "ranks-and-bias", "loraxs"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_lora_folder(tmp_path: Path, make: Any, config: Any) -> None:
    want = logits(adapter(tmp_path, make(), config))
    done = as_json(*words(tmp_path, "lora", "out"))
    got = peft.PeftModel.from_pretrained(make(), str(tmp_path / "out")).eval()
    assert distance(want, logits(got)) < 1e-5
    assert distance(want, logits(make())) > 0.01
    assert done["layers"] == sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in got.modules())
    assert set(done["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_a_lora_folder_of_a_smaller_rank_and_what_vllm_needs(tmp_path: Path) -> None:
    adapter(tmp_path, gpt2(), LoraConfig(r=20, bias="lora_only", modules_to_save=["ln_f"], target_modules=["c_attn"]))
    done = as_json(*words(tmp_path, "lora", "out"))
    assert done["rank"] == 20
    assert len(done["warnings"]) == 3
    assert "vLLM needs --max-lora-rank 32 for it" in done["warnings"]
    small = as_json(*words(tmp_path, "lora", "small"), "--rank", 2)
    assert small["rank"] == 2
    assert len(small["warnings"]) == 2
    assert 0 < max(small["errors"].values()) < 1


@pytest.mark.parametrize("name", ["dora", "ia3", "bottleneck"])
def test_what_is_no_lora_is_refused(tmp_path: Path, name: str) -> None:
    adapter(tmp_path, llama(), get_config(name))
    text = error(*words(tmp_path, "lora", "out"))
    assert ("export it --to merged" in text) is (name != "bottleneck")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["vera", "dora", "ia3"])
def test_a_merged_model_is_the_adapted_one(tmp_path: Path, name: str) -> None:
    want = logits(adapter(tmp_path, llama(), get_config(name)))
    done = as_json(*words(tmp_path, "merged", "out"))
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert distance(want, logits(got)) < CLOSE
    assert done["verified"] is True
    assert "the output" in error(*words(tmp_path, "merged", "out"))
    assert kilotune(*words(tmp_path, "merged", "out"), "--force").exit_code == 0


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_models_that_are_no_decoders(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "t5":
        from transformers import T5ForConditionalGeneration

        model: nn.Module = T5ForConditionalGeneration(t5())
        config = VeraConfig(r=4, target_modules=["q", "v"])
    else:
        from transformers import ViTForImageClassification

        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **shape))
        config = VeraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    adapted = adapter(tmp_path, model, config)
    change = weight_changes(adapted)
    assert f"model_type {kind!r}" in error(*words(tmp_path, "gguf", "a.gguf"))
    done = as_json(*words(tmp_path, "lora", "lora"))
    assert done["layers"] == len(change)
    assert bool(done["warnings"]) is (kind == "vit")  # its classifier is trained whole
    assert as_json(*words(tmp_path, "merged", "merged"))["verified"] is True
    held, plain = (type(model).from_pretrained(tmp_path / place) for place in ("merged", "base"))
    for name, delta in change.items():
        got = held.get_submodule(name).weight.detach().double() - plain.get_submodule(name).weight.detach().double()
        assert distance(delta, got) < 1e-4


def test_a_classifier_adapter(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(llama(num_labels=3).config)
    adapter(tmp_path, model, VeraConfig(r=4, task_type="SEQ_CLS"))
    assert "score: is trained whole" in error(*words(tmp_path, "gguf", "a.gguf"))
    assert "score" in as_json(*words(tmp_path, "lora", "lora"))["warnings"][0]
