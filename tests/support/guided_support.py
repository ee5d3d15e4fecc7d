"""For answers that fit a grammar: a toy model with all bytes in its vocabulary, and transformers' loop with a mask."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from kilotune.serve.engine.interface import JSON_SPACE, Engine, EngineStats, Finish, Generation, Grammar, Token
from kilotune.serve.engine.text_stream import TextStream
from tests.support.chat_tokenizers import byte_pairs, pieces_file

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "regex": Grammar(kind="regex", text="(cat|dog|bird)( sat){0,3}\\.", place="r"),
    "choice": Grammar(kind="choice", text='["the cat", "a d\\u00f6g/\\"", "a dog"]', place="c"),
    "lark": Grammar(kind="grammar", text='start: "a " ("cat" | "dog")+ "!"', place="g"),
    "gbnf": Grammar(kind="grammar", text='root ::= "a " ("cat" | "dog"){1,3} "!"', place="g"),
    "json": Grammar(
        kind="json",
        text='{"type": "object", "properties": {"name": {"enum": ["ann", "bob"]}}, "required": ["name"], '
        '"additionalProperties": false}',
        place="j",
    ),
}


def tokenizer_of(kind: str) -> Any:
    """pairs: Qwen's kind; pieces: SentencePiece's."""
    return _tokenizer(kind)


@functools.cache
def _tokenizer(kind: str) -> Any:
    if kind == "pairs":
        return byte_pairs()
    import transformers
    from tokenizers import Tokenizer, decoders

    document = json.loads(pieces_file("bpe"))  # with bytes that are no marks, and Llama's own decoder
    document["added_tokens"] = [one for one in document["added_tokens"] if not one["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(document))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@functools.cache
def guided_base(kind: str = "pairs") -> Any:
    """A random Llama for this tokenizer, with some tokens more than it has; the same object each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tokenizer_of(kind)
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer) + 5,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=3000,
            bos_token_id=1,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def running_pids(program: Path) -> list[int]:
    """The processes that run a program."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(program).encode() in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
    return found


def lark_of(grammar: Grammar) -> str:
    """A grammar in llguidance's own form, of the kinds that are used here."""
    import llguidance

    if grammar.kind == "json":
        return f"start: %json {json.dumps({**json.loads(grammar.text), 'x-guidance': JSON_SPACE})}"
    if grammar.kind == "regex":
        return f"start: /{grammar.text}/"
    return str(llguidance.grammar_from(grammar.kind, grammar.text))


class Masked:
    """A logits processor of transformers: what llguidance allows, by its own reading of the tokenizer."""

    def __init__(self, kind: str, grammar: Grammar, begin: int) -> None:
        import llguidance.hf

        tokenizer = tokenizer_of(kind)
        self.own = llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer) + 5)
        text = lark_of(grammar) + '\n%llguidance {"no_forcing": true}'
        self.matcher = llguidance.LLMatcher(self.own, text, log_level=0)
        assert not self.matcher.is_error(), self.matcher.get_error()
        self.begin = self.seen = begin

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token in ids[0, self.seen :].tolist():
            assert self.matcher.consume_token(token)
        self.seen = ids.shape[1]
        mask = self.matcher.compute_bitmask()
        allowed = [bool(mask[i // 8] >> (i % 8) & 1) for i in range(scores.shape[1])]
        return scores.masked_fill(~torch.tensor(allowed), -torch.inf)


def masked_greedy(model: Any, kind: str, grammar: Grammar, prompt: Sequence[int], count: int) -> list[int]:
    """What ``generate`` writes with the mask, its end included."""
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            logits_processor=[Masked(kind, grammar, len(prompt))],
        )
    return [int(token) for token in made[0, len(prompt) :]]


@contextmanager
def guided_serving(folder: Path, tokenizer: Any = None, engine: Any = None, **settings: Any) -> Iterator[Any]:
    """A service with the guided base, without adapters; tokenizer: with another template, say."""
    from kilotune.serve.engine.continuous_batching import TransformersEngine
    from kilotune.serve.engine.tenant_adapters import AdapterRegistry
    from kilotune.serve.http.prompts import Prompts
    from tests.support.http_support import serving

    tokenizer, base = tokenizer or tokenizer_of("pairs"), copy.deepcopy(guided_base())
    registry = AdapterRegistry(f"sqlite:///{folder / 'adapters.db'}", base)
    engine = engine or TransformersEngine(registry.model.get_base_model(), tokenizer, registry, max_running=16)
    prompts = Prompts(tokenizer, base.config.vocab_size)
    with serving(folder, engine=engine, catalogue=registry, prompts=prompts, **settings) as running:
        yield running


# -- tools -------------------------------------------------------------------------------------------

HERMES = (
    "{% if tools %}<|im_start|>system\nYou may call functions:\n<tools>{% for tool in tools %}\n{{ tool | tojson }}"
    '{% endfor %}\n</tools>\nWrite <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call> for it.<|im_end|>\n'
    "{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
    "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    '\n<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% if tools %}<|im_start|>system\nRespond in the format "
    '{"name": function name, "parameters": dictionary of argument name and its value}.\n'
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "<|im_end|>\n{% else %}<|im_start|>{{ 'ipython' if m.role == 'tool' else m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {"hermes": HERMES, "llama3_json": LLAMA3}


def weather(strict: bool | None = None, **more: Any) -> dict[str, Any]:
    """A tool."""
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    told = {"name": "weather", "description": "What it will be like.", "parameters": schema, **more}
    return {"type": "function", "function": told if strict is None else {**told, "strict": strict}}


class Scripted(Engine):
    """An engine that says what it is told to say, a token of its text at a time."""

    generates, embeds, labels, max_length = True, False, None, 2000

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.says = tokenizer, ""
        self.asked: list[Generation] = []

    def start(self) -> None: ...
    def stop(self, drain: float = 0.0) -> None: ...

    def healthy(self) -> str | None:
        return None

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0.0, 0, 0)

    async def generate(self, request: Generation) -> AsyncIterator[Token | Finish]:
        self.asked.append(request)
        stream = TextStream(self.tokenizer, request.prompt, (), shown=request.sampling.shown)
        ids = self.tokenizer(self.says, add_special_tokens=False)["input_ids"]
        for number in ids[: request.sampling.max_tokens]:
            yield Token(number, stream.push(number)[0], -1.0 if request.sampling.logprobs is not None else None)
        reason: Any = "length" if len(ids) > request.sampling.max_tokens else "stop"
        yield Finish(reason, stream.flush(), None, len(request.prompt), len(ids), 0)

    async def embed(self, tenant: str, adapter: Any, texts: Any) -> Any:
        raise NotImplementedError

    async def classify(self, tenant: str, adapter: Any, texts: Any) -> Any:
        raise NotImplementedError
