"""Tiny bases, adapters for them in a store, and what transformers says with them; shared by the tests of the plugin."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kilotune import LoraConfig, VeraConfig, get_peft_model
from kilotune.fleet.store import AdapterStore, open_store

VOCAB, EOS = 256, 255
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 7


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of 255 characters, and an end."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted(alphabet)[: VOCAB - 1])}
    vocabulary["</s>"] = EOS
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def base(
    folder: Path,
    *,
    kv_heads: int = 2,
    hidden: int = 128,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
    vocabulary: int = VOCAB,
) -> Path:
    """A Llama of four heads in ``folder``, with weights large enough for its answers to differ."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Kind:
    """What an adapter is like."""

    rank: int = 16
    targets: tuple[str, ...] = tuple(LINEAR)
    seed: int = SEED
    scale: float = 0.4


def adapted(folder: Path, number: int, kind: Kind = Kind()) -> Any:
    """The base with an adapter of its own numbers, as if it had been trained."""
    config = VeraConfig(r=kind.rank, projection_prng_key=kind.seed, target_modules=list(kind.targets), vera_dropout=0.0)
    model = get_peft_model(load(folder), config)
    generator = torch.Generator().manual_seed(1000 + number)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "vera_lambda" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * kind.scale)
    return model.eval()


def style(folder: Path) -> Any:
    """The base with a shared adapter, of a method that the plugin does not serve by itself."""
    plain = load(folder)
    torch.manual_seed(77)  # of its first numbers
    model = get_peft_model(plain, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(77)
    with torch.no_grad():
        for _, value in model.adapter_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def store_of(
    url: str, folder: Path, kinds: dict[str, Kind], packing: str = "float32", shared: str | None = None
) -> AdapterStore:
    """A store with an adapter for each name. shared: what a shared one is called that they all stand on."""
    store = open_store(url, base=load(folder), packing=packing)
    if shared is not None:
        store.put(shared, style(folder))
    for number, (name, kind) in enumerate(kinds.items()):
        store.put(name, adapted(folder, number, kind), on=shared)
    return store


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@torch.no_grad()
def reference(model: Any, prompt: list[int], count: int) -> Answer:
    """What transformers says, each token from the whole text before it, without any cache."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        scores = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1].float(), dim=-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores[tokens[-1]]))
    return Answer(tuple(tokens[len(prompt) :]), tuple(logprobs))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 41, (count,), generator=generator).tolist()
    return [torch.randint(0, EOS, (n,), generator=generator).tolist() for n in lengths]


def worst(got: Answer, expected: Answer) -> float:
    """The largest difference of log-probabilities; infinite where the tokens differ."""
    if got.tokens != expected.tokens:
        return float("inf")
    return max(abs(a - b) for a, b in zip(got.logprobs, expected.logprobs, strict=True))
