"""Tiny language models in GGUF, whose weights Q4_1 holds exactly, and wheels that carry one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kilotune.bases import Packaged, Wheel

BLOCK = 32
HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 64, 4, 2, 2, 96
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHEEL = "kilotune_toy_model-0.1-py3-none-any.whl"


def vocabulary() -> list[str]:
    """Three special tokens, GPT-2's characters for the 256 bytes, and one merge."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(letters[byte] for byte in range(256)), "hi"]


def toy(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A tied Llama; in float32 each row of 32 weights is q * d + m, with 4-bit q and float16 d and m."""
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and dtype is torch.float32:
                parameter.copy_(_values(*_blocks(draw, tuple(parameter.shape))))
            else:
                parameter.copy_(torch.randn_like(parameter).to(dtype))
    return model


def _blocks(draw: Any, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    rows, columns = shape
    quants = draw.integers(0, 16, (rows, columns // BLOCK, BLOCK))
    quants[..., 0], quants[..., 1] = 0, 15  # so that quantising finds d and m again
    d = (draw.integers(1, 64, (rows, columns // BLOCK, 1)) / 1024).astype(np.float16)
    m = (-draw.integers(1, 64, (rows, columns // BLOCK, 1)) / 128).astype(np.float16)
    return quants, d, m


def _values(quants: Any, d: Any, m: Any) -> Tensor:
    values = quants * d.astype(np.float64) + m.astype(np.float64)  # exact: few bits each
    return torch.from_numpy(values.reshape(values.shape[0], -1)).float()


def _q4_1(values: Any) -> Any:
    """The bytes of Q4_1: by block d, m (float16) and 16 bytes, the low halves first."""
    blocks = values.reshape(values.shape[0], -1, BLOCK).astype(np.float64)
    m = blocks.min(-1, keepdims=True)
    d = (blocks.max(-1, keepdims=True) - m) / 15
    quants = np.rint((blocks - m) / d).astype(np.uint8)
    packed = quants[..., :16] | (quants[..., 16:] << 4)
    scales = np.concatenate([d, m], -1).astype(np.float16).view(np.uint8)
    return np.concatenate([scales, packed], -1).reshape(values.shape[0], -1)


def _permuted(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp keeps q and k: the two halves of a head's rows in turn."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write(path: Path, model: Any, kind: str = "Q4_1", architecture: str = "llama", more: Any = None) -> Path:
    """The model as a GGUF file; ``more``: tensors beside the model's own."""
    out = gguf.GGUFWriter(str(path), architecture)
    out.add_context_length(128)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(INNER)
    out.add_block_count(LAYERS)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(50000.0)
    out.add_rope_dimension_count(HIDDEN // HEADS)
    tokens = vocabulary()
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_types([3, 3, 3, *([1] * 257)])
    out.add_token_merges(["h i"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(2)
    out.add_unk_token_id(0)
    out.add_chat_template(TEMPLATE)
    for name, value in {**_tensors(model), **(more or {})}.items():
        _add(out, name, value, kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _tensors(model: Any) -> dict[str, Tensor]:
    found = {
        "token_embd.weight": model.model.embed_tokens.weight.detach(),
        "output_norm.weight": model.model.norm.weight.detach(),
    }
    for n, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = layer.get_submodule(ours).weight.detach()
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(theirs)
            found[f"blk.{n}.{theirs}.weight"] = weight if heads is None else _permuted(weight, heads)
    return found


def _add(out: Any, name: str, value: Tensor, kind: str) -> None:
    if value.ndim == 1:
        out.add_tensor(name, value.float().numpy())
    elif kind == "Q4_1":
        out.add_tensor(name, _q4_1(value.numpy()), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    elif kind == "F16":
        out.add_tensor(name, value.half().numpy())
    else:
        raw = value.bfloat16().view(torch.int16).numpy().view(np.uint8)
        out.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def wheel(folder: Path, file: Path) -> Packaged:
    """A package with a GGUF file, in ``folder``, that pip takes; and how it is listed."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "kilotune_toy_model-0.1.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as packed:
        packed.write(file, "kilotune_toy_model/toy.gguf")
        packed.writestr(f"{info}/LICENSE", "the licence's text")
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: kilotune-toy-model\nVersion: 0.1\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return Packaged(
        folder="toy-instruct",
        title="a toy",
        wheel=Wheel(
            requirement="kilotune-toy-model==0.1",
            sha256=hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest(),
            licence="MIT",
            licence_member=f"{info}/LICENSE",
        ),
        member="kilotune_toy_model/toy.gguf",
        needed=1000,
    )
