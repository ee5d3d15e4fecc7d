"""Answers from the engine: one or many at a time, whole or as they come, with errors in HTTP's terms."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import final

from ...errors import KilotuneError
from ..engine.interface import Finish, Generation, Item, Prompted, Scored, Token
from .http_errors import ApiError, of_library
from .metrics import Metrics

__all__ = ["Answer", "Asked", "Event", "collect", "ended_badly", "events"]

Event = tuple[int, Item]
AHEAD = 64  # events of several answers that wait for the client


@final
@dataclass
class Answer:
    """One answer so far. scores: of its prompt's tokens, where they were asked for."""

    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    scores: Sequence[Scored | None] | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(token.text for token in self.tokens) + (self.finish.text if self.finish else "")


@final
class Asked:
    """The engine, with what is measured of its answers."""

    def __init__(
        self,
        engine_events: AsyncIterator[Item],
        generation: Generation,
        metrics: Metrics,
        labels: tuple[str, str],
    ) -> None:
        """labels: of :meth:`Metrics.of_adapter`."""
        self._events, self._metrics, self._tenant = engine_events, metrics, generation.tenant
        self._generation, self._labels = generation, labels
        self.first: float | None = None
        self.made = 0

    async def events(self) -> AsyncGenerator[Item, None]:
        """What comes of it, with errors in HTTP's terms."""
        recent, metrics = self._metrics.recent(self._tenant), self._metrics
        began = last = time.monotonic()
        recent.requests, recent.running = recent.requests + 1, recent.running + 1
        try:
            async for event in self._events:
                now = time.monotonic()
                if isinstance(event, Token):
                    self.made += 1
                    if self.first is None:
                        self.first = now - began
                        metrics.first.observe(self.first)
                        metrics.by_adapter.first.labels(*self._labels).observe(self.first)
                        recent.first.append(self.first)
                    else:
                        metrics.between.observe(now - last)
                    recent.add_token(now)
                    last = now
                elif isinstance(event, Finish):
                    self._count(event)
                    recent.whole.append(now - began)
                    recent.errors += ended_badly(event) is not None
                yield event
                if isinstance(event, Finish):
                    return
            raise ApiError(500, "the engine ended an answer without saying so")
        except KilotuneError as error:
            recent.errors += 1
            raise of_library(error, "model") from error
        finally:
            recent.running -= 1
            if self.queued is not None:
                metrics.queue.observe(self.queued)
            close = getattr(self._events, "aclose", None)
            if close is not None:
                await close()

    @property
    def queued(self) -> float | None:
        """Seconds that the engine let it wait before it began; None: it has not begun."""
        return self._generation.waits.queued

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self._generation.prompt)

    def _count(self, finish: Finish) -> None:
        label = self._metrics.label(self._tenant)
        self._metrics.prompt.labels(label).inc(finish.prompt_tokens)
        self._metrics.completion.labels(label).inc(finish.completion_tokens)
        self._metrics.cached.inc(finish.cached_tokens)
        by_adapter = self._metrics.by_adapter
        by_adapter.prompt.labels(*self._labels).inc(finish.prompt_tokens)
        by_adapter.completion.labels(*self._labels).inc(finish.completion_tokens)
        by_adapter.cached.labels(*self._labels).inc(finish.cached_tokens)


def ended_badly(finish: Finish) -> ApiError | None:
    """The error that an ending stands for; None where it is an answer's own."""
    if finish.reason == "deadline":
        return ApiError(504, f"the answer was not done in time; it had {finish.completion_tokens} tokens")
    if finish.reason == "cancelled":
        return ApiError(503, "the service is ending; ask another one", retry_after=5)
    if finish.reason == "grammar":
        return ApiError(400, finish.error or "the grammar cannot be followed", code="grammar_failed")
    if finish.reason == "error":
        return ApiError(500, finish.error or "the engine failed at this answer", code="engine_error")
    return None


async def events(asked: Sequence[Asked]) -> AsyncGenerator[Event, None]:
    """What comes of several answers, as it comes; the first error ends them all."""
    if len(asked) == 1:
        async with contextlib.aclosing(asked[0].events()) as only:
            async for one in only:
                yield 0, one
        return
    queue: asyncio.Queue[Event | BaseException] = asyncio.Queue(AHEAD)

    async def run(index: int) -> None:
        try:
            async with contextlib.aclosing(asked[index].events()) as mine:
                async for event in mine:
                    await queue.put((index, event))
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(run(index)) for index in range(len(asked))]
    try:
        left = len(tasks)
        while left:
            event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            left -= isinstance(event[1], Finish)
            yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def collect(stream: AsyncIterator[Event], count: int) -> list[Answer]:
    """All answers, whole.

    Raises:
        ApiError: one of them ended otherwise than by itself.

    """
    answers = [Answer() for _ in range(count)]
    async for index, event in stream:
        if isinstance(event, Token):
            answers[index].tokens.append(event)
            continue
        if isinstance(event, Prompted):
            answers[index].scores = event.scores
            continue
        if (error := ended_badly(event)) is not None:
            raise error
        answers[index].finish = event
    return answers
