"""Tiny random models under the names that PEFT's example scripts ask the hub for, in its cache.

python -m peft_own.example_models FOLDER NAME=KIND ...
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from peft_own.models import VOCABULARY, Tiny, model_of, place, tiny, tokenizer

_LLAMA = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_BERT = {**_LLAMA, "max_position_embeddings": 512}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_OPT = {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}

KINDS: dict[str, Tiny] = {
    "llama": tiny("ForCausalLM", "llama", _LLAMA, ""),
    "opt": tiny("ForCausalLM", "opt", _OPT, ""),
    "bloom": tiny("ForCausalLM", "bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, ""),
    "bert": tiny("", "bert", _BERT, ""),
    "roberta": tiny("ForSequenceClassification", "roberta", _BERT, ""),
    "t5": tiny("ForSeq2SeqLM", "t5", _T5, ""),
    "mt5": tiny("ForSeq2SeqLM", "mt5", _T5, ""),
}


def pipeline(files: Path) -> None:
    """A Stable Diffusion of two small blocks."""
    import torch
    import transformers

    diffusers: Any = importlib.import_module("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": (32, 64), "sample_size": 32}
    halves = {
        f"{way}_block_types": (f"{name}Block2D",) * 2 for way, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    words = tokenizer()
    words.model_max_length = 77
    text = transformers.CLIPTextConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=2, **_BERT)
    made = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(latent_channels=4, **halves, **sizes),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=words,
        unet=diffusers.UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            **sizes,
        ),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(files)


def dora(files: Path) -> None:
    """A DoRA of the tiny llama, by PEFT."""
    import peft
    import torch

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(model_of(KINDS["llama"]), config).save_pretrained(str(files))


def write(home: Path, name: str, kind: str) -> None:
    """Write one model where the hub's code finds it."""
    import torch

    files = place(home, name)
    if kind in ("pipeline", "dora"):
        {"pipeline": pipeline, "dora": dora}[kind](files)
        return
    torch.manual_seed(0)
    model_of(KINDS[kind]).save_pretrained(files)
    tokenizer().save_pretrained(files)


if __name__ == "__main__":
    for pair in sys.argv[2:]:
        write(Path(sys.argv[1]), *pair.split("=", 1))
