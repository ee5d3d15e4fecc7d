"""What the tests of serving engines share: a tiny model, adapters in a store, and answers made alone."""

from __future__ import annotations

import asyncio
import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kilotune import AdapterConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from kilotune.serve.engine.continuous_batching import TransformersEngine
from kilotune.serve.engine.interface import AdapterKey, Finish, Generation, Sampling, Token
from kilotune.serve.engine.tenant_adapters import AdapterRegistry
from tests.support.models import randomize

VOCABULARY = 64
FORMS: dict[str, AdapterConfig] = {
    "vera": VeraConfig(r=8, target_modules="all-linear"),
    "lora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"]),
}


@functools.cache
def base_model(seed: int = 0, length: int = 256) -> Any:
    """A random Llama of 2 blocks, width 32, vocabulary 64, with grouped heads; the same object each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def adapter_of(base: Any, seed: int, form: str = "vera", size: float = 0.5) -> PeftModel:
    """A model of its own with one random adapter, over the same weights."""
    model = get_peft_model(copy.deepcopy(base), FORMS[form])
    randomize(model, seed=seed, scale=size)
    return model.eval()


def alone(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens of ``generate``, for one prompt by itself."""
    return list(_alone(model, tuple(prompt), count))


@functools.cache
def _alone(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return [int(token) for token in out[0, len(prompt) :]]


def prompt_of(seed: int, length: int = 7) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())


def greedy(count: int, **more: Any) -> Sampling:
    return Sampling(max_tokens=count, temperature=0.0, **more)


@functools.cache
def byte_tokenizer() -> Any:
    """One token for each byte, so that a character may be several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


class Answer:
    """A stream, read to its end."""

    def __init__(self, tokens: list[Token], finish: Finish, prompted: Any = None) -> None:
        self.tokens, self.finish, self.prompted = tokens, finish, prompted

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.finish.text


async def answer(
    engine: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    adapter: AdapterKey | None = None,
    tenant: str = "t",
    deadline: float | None = None,
) -> Answer:
    request = Generation(
        id="r", tenant=tenant, adapter=adapter, prompt=tuple(prompt), sampling=sampling, deadline=deadline
    )
    tokens: list[Token] = []
    prompted = None
    async for item in engine.generate(request):
        if isinstance(item, Finish):
            return Answer(tokens, item, prompted)
        if isinstance(item, Token):
            tokens.append(item)
        else:
            prompted = item
    raise AssertionError("a stream without an end")


def answers(engine: Any, asked: Sequence[tuple[Any, ...]]) -> list[Answer]:
    """Several at once: (prompt, sampling, adapter, tenant) each."""

    async def run() -> list[Answer]:
        return await asyncio.gather(*(answer(engine, *one) for one in asked))

    return asyncio.run(run())


class Served:
    """An engine over a base with adapters a0, a1, ... of tenant "t" in a store."""

    def __init__(self, folder: Path, count: int = 4, kinds: Sequence[str] = ("vera",), **options: Any) -> None:
        engine = {k: options.pop(k) for k in ("max_running", "batch_tokens", "cache_tokens", "page") if k in options}
        tokenizer = options.pop("tokenizer", None)
        self.base = options.pop("base", None) or base_model()
        self.models = [adapter_of(self.base, i + 1, kinds[i % len(kinds)]) for i in range(count)]
        own = copy.deepcopy(self.base)
        self.registry = AdapterRegistry(f"sqlite:///{folder}/adapters.db", own, **options)
        self.keys = []
        for i, model in enumerate(self.models):
            version = self.registry.put("t", f"a{i}", model)
            self.keys.append(AdapterKey("t", f"a{i}", version.version, version.sha256))
        self.engine = TransformersEngine(own, tokenizer, self.registry, **engine)

    def __enter__(self) -> Served:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()
        self.registry.close()
