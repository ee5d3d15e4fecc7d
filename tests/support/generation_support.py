"""Tiny language models with adapters that change what they write, and their tokenizers."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from kilotune import PeftModel, VeraConfig, get_peft_model
from tests.support.cli_helpers import shake
from tests.support.train_support import model_folder, sentence

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["q", "v", "wo"]}
PROMPT = sentence(3, 4)


def base_of(kind: str, folder: Path, template: bool = False) -> Path:
    """A base of ``kind`` in ``folder``, whose weights are large enough that its texts are no single token."""
    shutil.copytree(model_folder(kind), folder)
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if template:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    return folder


def adapter_of(kind: str, base: Path, folder: Path, size: float = 0.5) -> Path:
    """An adapter of ``base`` in ``folder``."""
    adapted = shake(get_peft_model(loaded(kind, base), VeraConfig(r=8, target_modules=TARGETS[kind])), size)
    adapted.save_pretrained(folder)
    return folder


def loaded(kind: str, folder: Path) -> Any:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def merged(kind: str, base: Path, adapter: Path) -> Any:
    """The adapter in its base, merged: a plain model of transformers."""
    return PeftModel.from_pretrained(loaded(kind, base), adapter).merge_and_unload().eval()


def greedy(model: Any, ids: list[int], count: int, **more: Any) -> list[int]:
    """What transformers' own ``generate`` writes, its prompt taken away."""
    given = torch.tensor([ids])
    made = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, **more
    )
    return made[0, 1:].tolist() if model.config.is_encoder_decoder else made[0, len(ids) :].tolist()


@functools.cache
def _place() -> Path:
    return Path(tempfile.mkdtemp(prefix="kilotune-writing-"))


def pair(kind: str, template: bool = False) -> tuple[Path, Path]:
    """(base, adapter), made once, so only read them."""
    return _pair(kind, template)


@functools.cache
def _pair(kind: str, template: bool) -> tuple[Path, Path]:
    place = _place() / f"{kind}-{template}"
    base = base_of(kind, place / "base", template)
    return base, adapter_of(kind, base, place / "adapter")
