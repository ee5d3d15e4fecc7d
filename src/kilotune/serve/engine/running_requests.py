"""One request while it is in the engine, and the stream of what it gives to an asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol, final

from ...errors import ConfigError, ResourceError, UnsupportedError
from .device_adapters import Held, Row
from .grammars import Guide
from .interface import EngineError, Finish, Generation, Item, Prompted, Sampling, Token
from .paged_attention import Part
from .prompt_scores import PromptScores
from .sampling import Choice, Picker
from .text_stream import TextStream

__all__ = ["Again", "Run", "check_request", "end_tokens", "homes", "newest_of_most"]


def check_request(request: Generation, vocabulary: int, max_length: int, texts: bool) -> None:
    """What an engine can be asked. texts: it has a tokenizer.

    Raises:
        ConfigError: with what to ask for instead.

    """
    prompt, sampling = request.prompt, request.sampling
    if not prompt or any(not 0 <= token < vocabulary for token in prompt):
        raise ConfigError(f"prompt: expected at least one token, each in 0 ... {vocabulary - 1}")
    if sampling.max_tokens < 0 or len(prompt) + sampling.max_tokens > max_length:
        raise ConfigError(
            f"max_tokens: expected 0 to {max_length - len(prompt)} behind a prompt of {len(prompt)} tokens "
            f"(at most {max_length} together), got {sampling.max_tokens}"
        )
    if not (sampling.temperature >= 0 and 0 < sampling.top_p <= 1):
        raise ConfigError("temperature: expected at least 0; top_p: expected a number in (0, 1]")
    if (sampling.top_k is not None and sampling.top_k < 1) or (sampling.seed is not None and sampling.seed < 0):
        raise ConfigError("top_k: expected at least 1; seed: expected at least 0")
    if sampling.prompt_logprobs is not None and sampling.prompt_logprobs < 0:
        raise ConfigError(f"prompt_logprobs: expected at least 0, got {sampling.prompt_logprobs}")
    _check_penalties(sampling, vocabulary)
    if sampling.grammar is not None and (sampling.ignore_eos or not texts):
        raise ConfigError("ignore_eos: not with a grammar, which says where an answer ends, and needs a tokenizer")
    if sampling.stop and not texts:
        raise ConfigError("stop: needs a tokenizer, and the engine has none")


def _check_penalties(sampling: Sampling, vocabulary: int) -> None:
    """Bounds within which no logit leaves float32."""
    for name, value, least, most in (
        ("repetition_penalty", sampling.repetition_penalty, 0.01, 100.0),
        ("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0),
        ("presence_penalty", sampling.presence_penalty, -2.0, 2.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{name}: expected a number from {least:g} to {most:g}, got {value!r}")
    for token, value in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise ConfigError(f"logit_bias: token {token}; the model has {vocabulary}")
        if not -100 <= value <= 100:
            raise ConfigError(f"logit_bias: expected numbers from -100 to 100, got {value!r} of token {token}")


@final
class Again:
    """In place of an end: the adapter has to be read again, and the request sent once more."""


class Loop(Protocol):
    """What has something called in the thread that waits for a request: an asyncio loop, or :class:`OwnThread`."""

    def call_soon_threadsafe(self, callback: Callable[..., object], /, *args: Any) -> object: ...


@final
class OwnThread:
    """Stands for a loop where a thread has nothing to do but to wait for one request."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def call_soon_threadsafe(self, callback: Callable[..., object], /, *args: Any) -> None:
        """Have it called by :meth:`wait`."""
        self._calls.put(partial(callback, *args))

    def wait(self, seconds: float) -> bool:
        """Until something came, or for so long; whether it came."""
        try:
            self._calls.get(timeout=seconds)()
        except Empty:
            return False
        return True


@final
class Run:
    """A request in the engine. The engine's thread writes it, but for ``left`` and ``row``.

    id: of the present admission; tokens: the prompt and what was generated.
    """

    def __init__(
        self,
        request: Generation,
        row: Row | None,
        loop: Loop | None,
        tokenizer: Any,
        ends: frozenset[int],
        asked: float | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.guide = guide
        self.request, self.row, self.loop = request, row, loop
        self._asked = time.monotonic() if asked is None else asked
        self.tenant, self.deadline, self.id = request.tenant, request.deadline, ""
        sampling = request.sampling
        self.tokens = list(request.prompt)
        self.picker = Picker(sampling, self.tokens)
        asked = sampling.prompt_logprobs
        self._scores = None if asked is None else PromptScores(request.prompt, asked)
        self._prompted = False
        self.held: Held | None = None
        self.left = self.suspect = False
        self.cached = 0
        key = request.adapter
        whose = "" if key is None else f"{key.namespace}\0{key.sha256}"
        if key is not None and key.on is not None:  # what the shared one made of a prompt is another tenant's, too
            whose += f"\0{key.on.namespace}\0{key.on.sha256}"
        self.owner = f"{request.tenant}\0{whose}".encode()
        self._ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else ends)
        self._text = TextStream(tokenizer, request.prompt, sampling.stop, shown=sampling.shown)
        self._fresh = True
        self._stopped = False
        self._items: deque[Item | Again] = deque()
        self._ready = asyncio.Event()

    @classmethod
    def warming(cls) -> Run:
        """Of nobody, for the steps before the first request."""
        return cls(
            Generation(id="", tenant="", adapter=None, prompt=(0,), sampling=Sampling(max_tokens=1, temperature=0.0)),
            None,
            None,
            None,
            frozenset(),
        )

    # -- the engine's side -----------------------------------------------------------------------

    def begins(self) -> None:
        """It runs, for the first time or again."""
        if self.request.waits.queued is None:
            self.request.waits.queued = time.monotonic() - self._asked

    def took(self, part: Part) -> None:
        """A step computed a part of it."""
        if self._fresh:
            self.cached = min(part.cached, len(self.request.prompt))
            self._fresh = False

    @staticmethod
    def look_all(runs: Sequence[Run]) -> None:
        """Before tokens are chosen: take in which ones may come next."""
        for run in runs:
            if (guide := run.guide) is not None:
                run.picker.allowed, run.picker.idle = guide.allowed, guide.allowed is None or guide.over

    @property
    def scoring(self) -> PromptScores | None:
        """Its prompt's log-probabilities, where they are asked for and not all known."""
        return None if self._scores is None or self._scores.complete else self._scores

    @property
    def finite(self) -> bool:
        """Whether what is known of them is numbers."""
        return self._scores is None or self._scores.finite

    def push(self, choice: Choice) -> tuple[list[Item], Any]:
        """(what the new token tells the stream, why it is the last one or None)."""
        items: list[Item] = []
        if self._scores is not None and not self._prompted:
            items.append(Prompted(self._scores.all))
            self._prompted = True
        most = self.request.sampling.max_tokens
        if not most:  # the prompt is all of it
            return items, "length"
        self.tokens.append(choice.token)
        if choice.token in self._ends:
            return [*items, Token(choice.token, "", choice.logprob, choice.top)], "stop"
        text, self._stopped = self._text.push(choice.token)
        items.append(Token(choice.token, text, choice.logprob, choice.top))
        if self._stopped:
            return items, "stop"
        if self.made >= most:
            return items, "length"
        if self.guide is not None:
            self.guide.advance(choice.token)
        return items, None

    @property
    def made(self) -> int:
        """How many tokens were generated."""
        return len(self.tokens) - len(self.request.prompt)

    def finish(self, reason: Any, error: str | None = None) -> Finish:
        """The end of its stream."""
        text = "" if self._stopped else self._text.flush()
        return Finish(reason, text, error, len(self.request.prompt), self.made, self.cached)

    def tell(self, items: Sequence[Item | Again]) -> None:
        """Give items to the stream, in its loop's thread."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                self.loop.call_soon_threadsafe(self._put, items)

    @staticmethod
    def tell_all(streams: Mapping[Any, Sequence[tuple[Run, Sequence[Any]]]]) -> None:
        """Give the items of a step to all streams, with one wake-up for each loop."""
        for loop, told in streams.items():
            if loop is not None:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(_put_all, told)

    def _put(self, items: Sequence[Item | Again]) -> None:
        self._items.extend(items)
        self._ready.set()

    # -- the stream's side -----------------------------------------------------------------------

    def there(self) -> Iterator[Item | Again]:
        """What came and was not taken yet."""
        while self._items:
            yield self._items.popleft()

    async def items(self) -> AsyncIterator[Item | Again]:
        """What comes; ends never by itself."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            for item in self.there():
                yield item


def _put_all(told: Sequence[tuple[Run, Sequence[Any]]]) -> None:
    for run, items in told:
        run._put(items)


def tried(run: Run) -> bool:
    """Whether a request that tries an adapter has ended.

    Raises:
        UnsupportedError: it failed. ResourceError: the engine did not come to it. EngineError: it ends.

    """
    for item in run.there():
        if isinstance(item, Again):
            raise ResourceError("adapters of too many forms are in use; try again later")
        if isinstance(item, Finish):
            if item.reason == "error":
                raise UnsupportedError(item.error or "the model failed")
            if item.reason == "cancelled":
                raise EngineError("the engine ends, and did not come to try the adapter")
            if item.reason not in ("stop", "length"):
                raise ResourceError(f"the engine did not come to try the adapter: {item.reason}")
            return True
    return False


def homes(run: Run) -> set[object]:
    """Where a request's adapter is on the device, and what that stands on."""
    return set() if run.row is None else {*run.row.homes}


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens that end an answer, as ``generate`` takes them."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return frozenset([] if found is None else [found] if isinstance(found, int) else found)


def newest_of_most(runs: Sequence[Run], weight: Callable[[Run], int], running: Callable[[str], int]) -> Run | None:
    """The newest request of the tenant with the most of something, of those with several; None: there is none.

    runs: the oldest first. running: (tenant) -> how many it has.
    """
    weights: dict[str, int] = {}
    for run in runs:
        weights[run.tenant] = weights.get(run.tenant, 0) + weight(run)
    several = [tenant for tenant in weights if weights[tenant] and running(tenant) > 1]
    if not several:
        return None
    most = max(several, key=lambda tenant: weights[tenant])
    return next(run for run in reversed(runs) if run.tenant == most and weight(run))
