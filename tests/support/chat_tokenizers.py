"""Chat models' tokenizers of two kinds, trained on the spot, with templates of the kinds that there are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.train_data import corpus

HEADERS = ["<|im_start|>", "<|im_end|>"]
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# Qwen's kind: a tool's result is a user's turn, in a pair of tags; thoughts of earlier answers are an empty pair.
CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n<think>\n\n</think>\n\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endif %}{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{% if m.name %}{{ m.name }}: {% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Gemma's kind: another name for the model's turns, and texts without blanks around them.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Llama 2's kind: the marks of turns are words.
LLAMA = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set content = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Alpaca's kind, and ChatML in a tokenizer that does not know it.
ALPACA = (
    "{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
PLAIN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def _byte_pairs() -> str:
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus(), trainer)
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in HEADERS])
    made.add_tokens([AddedToken(name, normalized=False) for name in WORDS])
    return made.to_str()


def byte_pairs(template: str = CHATML) -> Any:
    """Qwen's kind: bytes, NFC, tokens beside the vocabulary; some of them are special and some are words."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_pairs()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


GEMMA_MARKS = ["<start_of_turn>", "<end_of_turn>"]


@functools.cache
def pieces_file(kind: str) -> str:
    """SentencePiece's kinds: blanks are letters, the control tokens are pieces of the vocabulary as any other."""
    special = ["<unk>", "<s>", "</s>"]
    made = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    signs = ["<", ">", "/", "s", "[", "]", "|", "</", "s>", "_", "#", ":", "\n"]
    options: dict[str, Any] = {"vocab_size": 600, "show_progress": False, "initial_alphabet": signs}
    if kind == "unigram":
        trainer: Any = trainers.UnigramTrainer(special_tokens=special, unk_token="<unk>", **options)
    else:
        held = [*special, *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(special_tokens=held, **options)
    made.train_from_iterator([*corpus(), *(" ".join(signs),) * 50], trainer)
    made.add_tokens([AddedToken(name, normalized=False) for name in GEMMA_MARKS])
    return made.to_str()


def pieces(kind: str = "unigram", template: str = LLAMA) -> Any:
    """kind: unigram or bpe."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(pieces_file(kind)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that no text may make; what stands for unknown characters, and for bytes, is not among them."""
    held = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i for i, token in held.items() if token.content != "<unk>" and not token.content.startswith("<0x")}


def asked(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """What transformers itself makes of a chat."""
    found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(found["input_ids"])
