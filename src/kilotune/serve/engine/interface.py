"""What the HTTP service asks of an engine, and what it gets back. Plain data and one abstract class.

An engine knows adapters by :class:`AdapterKey`: one version of one tenant's adapter, by its content. A request keeps
the key that it was given, so replacing or deleting an adapter changes no request that runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self, final

from ...errors import ConfigError, StoreError
from ...fleet.store.records import SharedVersion, Version

__all__ = [
    "JSON_SPACE",
    "AdapterKey",
    "Engine",
    "EngineError",
    "EngineStats",
    "Finish",
    "Generation",
    "Grammar",
    "GrammarError",
    "Item",
    "Prompted",
    "Sampling",
    "Scored",
    "Token",
    "Vector",
    "Waits",
]

JSON_SPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}
"""What a schema's JSON may have between its parts, as llguidance's own key ``x-guidance`` says it: blanks, but not for
ever, which is what small models like to write."""
Reason = Literal["stop", "length", "cancelled", "deadline", "grammar", "error"]


@final
@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One version of one adapter. sha256: of its contents, hexadecimal (:class:`~kilotune.fleet.store.Version`).

    on: the shared one that it stands on, which stands on none. own: SHA-256 of what it brings beside its numbers (a
    chat template, say); None: nothing, or nobody has looked.
    """

    namespace: str
    name: str
    version: int
    sha256: str
    on: AdapterKey | None = None
    own: str | None = None

    @classmethod
    def of(cls, namespace: str, version: Version) -> Self:
        """Of a version of ``namespace``, with what it stands on."""
        on = None if version.stands_on is None else cls.shared(version.stands_on)
        return cls(namespace, version.name, version.version, version.sha256, on, version.own)

    @classmethod
    def shared(cls, on: SharedVersion) -> Self:
        """Of a version that others stand on."""
        return cls(on.namespace, on.name, on.version, on.sha256)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer's text has to fit, from its first token to its end.

    kind: of ``text``: a JSON schema; a regular expression for all of the text; Lark's or llama.cpp's (GBNF) form of a
    grammar; or a JSON list of the texts that may be. place: what of a request it is, for errors. schemas: the JSON
    schemas within a grammar, with their places. lenient: keywords of a schema that cannot be held to are passed over.
    """

    kind: Literal["json", "regex", "grammar", "choice"]
    text: str = field(repr=False)
    place: str
    schemas: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    lenient: bool = False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    max_tokens: at most so many; 0: the prompt is read, and that is all. temperature: 0 takes the likeliest token.
    top_p: of the likeliest tokens that together have this probability, in (0, 1]. top_k: of so many; None: of all.
    seed: the draws of a request with a seed depend on the seed and on nothing else, whatever else is in the batch.
    stop: texts that end the answer, and are not part of it. stop_token_ids: tokens that do, beside the model's own.
    ignore_eos: go on behind the model's end token.
    logprobs: how many likeliest tokens come with each token; 0: only the token's own; None: no log-probabilities.
    prompt_logprobs: the same of the prompt's tokens, which are then all computed, whatever is in the cache.

    These change the logits before a token is chosen, greedily too, in this order. logit_bias: (token, what is added).
    repetition_penalty: logits of tokens of the prompt and the answer so far are divided by it where they are positive,
    else multiplied; 1: nothing. frequency_penalty: is taken off once for each time that the answer has the token.
    presence_penalty: is taken off where the answer has it. min_p: then only tokens are drawn that have this part of the
    likeliest token's probability, after the temperature.

    grammar: what the answer has to fit. Only tokens that it allows are chosen; the model's end, and special tokens of
    stop_token_ids, where it may end.
    shown: special tokens that are a part of the text, which others are not.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    grammar: Grammar | None = None
    shown: tuple[int, ...] = ()


@final
@dataclass(slots=True)
class Waits:
    """What an engine notes of a request that it has taken, for who asked, and be it gone.

    queued: seconds until it began with it, its adapter read and its turn come; None: it has not begun.
    """

    queued: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One text to go on with. tenant: whom it counts for; deadline: of time.monotonic(), or None."""

    id: str
    tenant: str
    adapter: AdapterKey | None
    prompt: tuple[int, ...] = field(repr=False)
    sampling: Sampling
    deadline: float | None = None
    waits: Waits = field(default_factory=Waits, compare=False, repr=False)


@final
@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. text: what it adds, which may be empty while a character or a stop text is unfinished.

    logprob: natural, of the model's own distribution (before penalties, temperature and top_p). top: the likeliest
    tokens with theirs, best first.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@final
class Scored(NamedTuple):
    """A token of a prompt. logprob: after the tokens before it, natural, of the model's own distribution.

    rank: how many tokens are at least as likely, from 1. top: the likeliest tokens with theirs, best first.
    """

    id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@final
@dataclass(frozen=True, slots=True)
class Prompted:
    """What a request with ``prompt_logprobs`` has before its first token: one of each token; None of the first one."""

    scores: Sequence[Scored | None]


@final
@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an answer, always the last thing of a stream.

    text: what was held back and belongs to it. error: what went wrong, for reason "error", and for "grammar", where the
    grammar cannot be followed any more; fit for the tenant.
    prompt_tokens, completion_tokens: what is billed. cached_tokens: of the prompt, what was already in the cache.
    """

    reason: Reason
    text: str = ""
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


Item = Prompted | Token | Finish
"""What comes of a request."""


@final
@dataclass(frozen=True, slots=True)
class Vector:
    """What an encoder gives for one text: an embedding (pooled), or a classifier's scores. tokens: of the text."""

    values: tuple[float, ...]
    tokens: int


@final
@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine at one moment.

    waiting, running: requests. tokens, steps: since the start. cache: the share of it in use. resident: adapters on the
    device. slots: how many it can hold.
    """

    waiting: int
    running: int
    tokens: int
    steps: int
    cache: float
    resident: int
    slots: int


@final
class EngineError(StoreError):
    """The engine takes no requests: it was not started, was stopped, or has ended."""


@final
class GrammarError(ConfigError):
    """A grammar that cannot be compiled. place: what of the request it is."""

    def __init__(self, told: str, place: str) -> None:
        super().__init__(f"{place}: {told}")
        self.place = place


class Engine(ABC):
    """Runs requests for many adapters in one batch. All methods may be called from any thread but where said."""

    generates: bool
    """Whether it takes :meth:`generate` (a causal language model)."""
    embeds: bool
    """Whether it takes :meth:`embed`."""
    labels: tuple[str, ...] | None
    """The names of a classifier's scores, or None where it takes no :meth:`classify`."""
    max_length: int
    """Tokens of prompt and answer together."""

    @abstractmethod
    def start(self) -> None:
        """Load, warm up, and be ready to answer at once; returns when that is so."""

    @abstractmethod
    def stop(self, drain: float = 0.0) -> None:
        """End. drain: seconds that running requests may still take; what is left then ends with "cancelled"."""

    @abstractmethod
    def healthy(self) -> str | None:
        """None, or why it cannot answer any more."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """How it stands."""

    @abstractmethod
    def generate(self, request: Generation) -> AsyncIterator[Item]:
        """The answer, token by token, with one :class:`Finish` at the end; for an asyncio loop.

        With ``prompt_logprobs`` one :class:`Prompted` comes before all tokens.

        Requests of different tenants share the engine fairly: one that sends many does not keep another waiting.
        Leaving the iterator (``aclose``, a cancelled task) ends the request at the next step.
        """

    @abstractmethod
    async def embed(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        """The embedding of each text (its tokens), batched with whatever else waits.

        Raises:
            AdapterError: the adapter is lost or broken.

        """

    @abstractmethod
    async def classify(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        """The classifier's scores (logits) of each text; raises as :meth:`embed`."""
