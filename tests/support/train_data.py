"""Real tokenizers, trained on the spot on text that is installed, and real data in small files."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import json
import logging
import tarfile
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from kilotune.train.settings.sections import DataSettings

MODULES = (argparse, ast, inspect, json, logging, tarfile, textwrap, functools)
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]


@functools.cache
def docstrings() -> dict[str, list[str]]:
    """Module -> the docstrings in it: text that people wrote, of different lengths."""
    found = {}
    for module in MODULES:
        nodes = ast.walk(ast.parse(inspect.getsource(module)))
        kinds = ast.FunctionDef | ast.ClassDef
        found[module.__name__] = [
            text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))
        ]
    return found


def corpus() -> list[str]:
    return [text for texts in docstrings().values() for text in texts]


@functools.cache
def _byte_level() -> str:
    """GPT-2's kind: byte pairs, words with the blank before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<|endoftext|>", "<pad>", *CHAT_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()


@functools.cache
def _metaspace() -> str:
    """Llama 2's kind: a mark for each blank, one before the text, and a token that begins it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str()


@functools.cache
def _word_piece() -> str:
    """BERT's kind: lower case, pieces of words, [CLS] and [SEP] around a text and between two."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    pair = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str()


def byte_level(**more: Any) -> Any:
    options = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<pad>",
        "extra_special_tokens": CHAT_TOKENS,
        **more,
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_byte_level()), **options)


def metaspace(**more: Any) -> Any:
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **more}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_metaspace()), **options)


def word_piece(**more: Any) -> Any:
    options = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **more,
    }
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_word_piece()), **options)


def jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(**values: Any) -> DataSettings:
    return DataSettings(**values)
