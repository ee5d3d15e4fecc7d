"""Folders of tiny models of transformers with a tokenizer trained here, and data to fine-tune them on."""

from __future__ import annotations

import functools
import json
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "big",
    "red",
    "dog",
    "run",
    "far",
    "away",
    "from",
    "its",
    "small",
    "blue",
    "house",
    "in",
    "rain",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<s>", "</s>"]
VOCABULARY = 96
LENGTH = 64
KINDS = ("llama", "gpt2", "gpt_bigcode", "bert", "vit", "t5")


def sentence(index: int, words: int = 6) -> str:
    """Some words, others for each index."""
    return " ".join(WORDS[(index * 7 + place * (index % 5 + 1)) % len(WORDS)] for place in range(words))


def tokenizer(pad: bool = True, bert: bool = False) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on the sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    made.train_from_iterator([sentence(i) for i in range(64)], trainer)
    if bert:
        pairs = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
        )
    special = {"unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"}
    special |= {"pad_token": "[PAD]"} if pad else {}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"} if bert else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=LENGTH, **special)


@functools.cache
def _store() -> Path:
    return Path(tempfile.mkdtemp(prefix="kilotune-tests-"))


@functools.cache
def model_folder(
    kind: str, pad: bool = True, dtype: str = "float32", dropout: float = 0.0, seed: int = 0, layers: int = 2
) -> Path:
    """A folder with a tiny model of ``kind`` and its tokenizer or image processor; made once, so only read it."""
    folder = _store() / f"{kind}-{pad}-{dtype}-{dropout}-{seed}-{layers}"
    torch.manual_seed(seed)
    model = _model(kind, dropout, layers).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    if kind == "vit":
        from transformers import ViTImageProcessor

        ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    else:
        made = tokenizer(pad, bert=kind == "bert")
        if not pad:
            _without_pad(folder)
        made.save_pretrained(folder)
    return folder


def _without_pad(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["pad_token_id"] = None
    path.write_text(json.dumps(values))


def _model(kind: str, dropout: float, layers: int) -> Any:
    import transformers as t

    tokens = {"bos_token_id": SPECIAL.index("<s>"), "eos_token_id": SPECIAL.index("</s>"), "pad_token_id": 0}
    size = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    gpt = {"n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY, **tokens}
    gpt |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    if kind == "llama":
        config = t.LlamaConfig(
            vocab_size=VOCABULARY, max_position_embeddings=LENGTH, attention_dropout=dropout, **size, **tokens
        )
        return t.LlamaForCausalLM(config)
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(**gpt))
    if kind == "gpt_bigcode":
        return t.GPTBigCodeForCausalLM(t.GPTBigCodeConfig(**gpt))
    if kind == "bert":
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = t.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, pad_token_id=0, **size, **drops)
        return t.BertModel(config)
    if kind == "vit":
        return t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **size, hidden_dropout_prob=dropout))
    assert kind == "t5"
    config = t.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=SPECIAL.index("</s>"),
    )
    return t.T5ForConditionalGeneration(config)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompts(count: int = 12) -> list[dict[str, Any]]:
    """Rows of a prompt and a completion."""
    return [{"prompt": sentence(i, 3), "completion": " " + sentence(i + 1, 4)} for i in range(count)]


def pictures(folder: Path, count: int = 6, classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """A folder with a folder of PNG files for each class."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = chance.integers(0, 96, (16, 16, 3)) + 150 * number
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to write files beyond ``size`` bytes, as it refuses to write on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
