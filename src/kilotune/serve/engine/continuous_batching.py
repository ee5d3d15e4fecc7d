"""The engine for language models: requests for many adapters in one batch, on transformers' continuous batching.

::

    generate() ──inbox──► engine's thread: take in ─► admit ─► step ─► tell ──events──► generate()
       │                     waiting: FairQueue by tenant
       └ reads the adapter (in a thread of its own pool) before the request may wait

The thread alone touches the batch. It admits requests by turns of tenants (fairness.py), each with its adapter held on
the device, runs one step of all, and tells each stream what is new. Where a tenant waits and others have all there is
(places, room in the cache, adapters' slots), the newest request of who has most goes back to wait: it is computed again
later from its tokens, and its stream sees nothing.

What generates has its token in each step. What is left of the step is shared out between prompts (fairness.py), as far
as the time goes that a step is to take (pace.py). A part of the cache is for short requests, so that none of them waits
until a long one ends, nor a long one for ever.

A step that fails is run again, each request by itself, so that only those fail that fail alone. When the thread itself
ends, everybody is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ...errors import ConfigError, KilotuneError, UnsupportedError, first_line
from .cache_room import CacheRoom
from .cores import Cores
from .device_adapters import GoneError, Row
from .fairness import FairQueue, Unread, share_out
from .grammars import Grammars, wait_for
from .interface import AdapterKey, Engine, EngineError, EngineStats, Finish, Generation, Item, Sampling, Vector
from .lanes import Lanes
from .pace import Pace
from .paged_attention import PagedBatch, PageSizes, Part
from .prompt_scores import PromptScores, most_tokens, share_scored
from .running_requests import Again, OwnThread, Run, check_request, end_tokens, homes, newest_of_most, tried
from .sampling import Choice, choose
from .tenant_adapters import AdapterRegistry

__all__ = ["TransformersEngine"]

LOADERS, EACH = 4, 2  # threads that read adapters, and how many of them one tenant has at most
TRIAL = 60.0  # seconds that an adapter's trial may wait for its turn
LOOK = 1.0  # seconds between looks whether the engine of a trial is still there
IDLE = 0.05  # seconds between looks at deadlines
log = logging.getLogger("kilotune.serve")


@final
class TransformersEngine(Engine):
    """See :class:`Engine`; for causal language models of transformers.

    Args:
        model: the model that ``adapters`` was made with.
        tokenizer: of transformers, for the texts; None: tokens come without.
        adapters: the adapters of all tenants.
        max_running: requests that run at once.
        max_length: tokens of prompt and answer together; by default what the model and three quarters of the cache
            can take.
        batch_tokens: tokens of one step; longer prompts take several, and so do those that share a step.
        cache_tokens: for which keys and values are kept, of all requests together; by default enough for
            ``max_running`` requests of 512 tokens.
        page: tokens of a page of the cache.

    Raises:
        ConfigError: an option. UnsupportedError: no causal language model.

    """

    generates = True
    embeds = False
    labels = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: AdapterRegistry,
        *,
        max_running: int = 64,
        max_length: int | None = None,
        batch_tokens: int = 512,
        cache_tokens: int | None = None,
        page: int = 16,
    ) -> None:
        for name, value in (("max_running", max_running), ("batch_tokens", batch_tokens), ("page", page)):
            if value < 1:
                raise ConfigError(f"{name}: expected a whole number, at least 1, got {value!r}")
        base: Any = adapters.model.get_base_model()
        if model is not base and model is not adapters.model:
            raise ConfigError("the engine's model is not the one that its adapters were made with")
        self._model, self._tokenizer, self._adapters = base, tokenizer, adapters
        cache = max_running * 512 if cache_tokens is None else cache_tokens
        self._sizes = PageSizes(
            requests=max_running, batch_tokens=max(batch_tokens, max_running), cache_tokens=cache, page=page
        )
        config = base.config.get_text_config()
        own = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or cache
        self._room = CacheRoom(cache, page)
        self.max_length = min(own, self._room.longest, *([] if max_length is None else [max_length]))
        self._vocabulary = int(config.vocab_size)
        self._ends = end_tokens(base)
        self._batch: PagedBatch | None = None
        self._queue: FairQueue[Run] = FairQueue()
        self._pace, self.cores = Pace(self._sizes.batch_tokens), Cores()
        self._running: dict[str, Run] = {}  # the oldest first
        self._suspects: deque[Run] = deque()
        self._parked: list[Run] = []  # whose grammars are not done with their next token
        self._grammars = Grammars(tokenizer, self._vocabulary, self._ends, max_running)
        self._inbox: deque[Run] = deque()
        self._wake = threading.Event()
        self._ids = itertools.count()
        self._chosen: dict[str, Choice] = {}
        self._loaders = Lanes("kilotune-adapters", LOADERS, EACH)
        self._thread: threading.Thread | None = None
        self._until: float | None = None  # when what runs is cancelled; None: go on
        self._dead: str | None = "the engine has not been started"
        self._tokens = self._steps = 0

    # -- Engine ----------------------------------------------------------------------------------

    def start(self) -> None:
        if self._thread is not None:
            return
        self._batch = PagedBatch(
            self._model, self._sizes, self._owner, self._around, self._share, self._choose, self._scoring
        )
        self._room = CacheRoom(self._batch.capacity, self._batch.page)
        self._warm()
        self._dead, self._until = None, None
        self._adapters.trial = self._try
        self._thread = threading.Thread(target=self._run, name="kilotune-engine", daemon=True)
        self._thread.start()

    def _warm(self, steps: int = 2) -> None:
        """Run the base alone. What a first step takes longer for (threads, memory, picked kernels) is taken so."""
        assert self._batch is not None
        self._running["warm"] = Run.warming()
        self._batch.add("warm", [0] * min(8, self.max_length - 1))
        for _ in range(steps):
            with self._adapters.residents.turns.stepping():
                self._batch.step()
        self._running.clear()
        self._batch.clear()

    def stop(self, drain: float = 0.0) -> None:
        if self._thread is None:
            return
        self._until = time.monotonic() + drain
        self._adapters.trial = None
        self._wake.set()
        self._thread.join()
        self._thread = None
        self._loaders.close()
        self._grammars.close()
        if self._batch is not None:
            self._batch.close()
            self._batch = None

    def healthy(self) -> str | None:
        return self._dead

    def stats(self) -> EngineStats:
        batch = self._batch
        return EngineStats(
            waiting=len(self._queue) + len(self._inbox) + len(self._suspects) + len(self._parked),
            running=len(self._running),
            tokens=self._tokens,
            steps=self._steps,
            cache=0.0 if batch is None else batch.used,
            resident=self._adapters.residents.resident,
            slots=self._adapters.residents.room,
        )

    async def generate(self, request: Generation) -> AsyncIterator[Item]:
        check_request(request, self._vocabulary, self.max_length, self._tokenizer is not None)
        loop, asked = asyncio.get_running_loop(), time.monotonic()
        row = await self._row(request.adapter)
        try:
            guide = await self._grammars.guide(request)
        except TimeoutError:
            yield Finish("deadline", prompt_tokens=len(request.prompt))
            return
        run = Run(request, row, loop, self._tokenizer, self._ends, asked, guide)
        try:
            while True:
                self._send(run)
                async for item in run.items():
                    if isinstance(item, Again):
                        break
                    yield item
                    if isinstance(item, Finish):
                        return
                run.row = await self._row(request.adapter)
        finally:
            run.left = True
            self._wake.set()
            if guide is not None:
                await guide.aclose()

    async def embed(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        raise UnsupportedError("a language model that generates gives no embeddings; serve an encoder for them")

    async def classify(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        raise UnsupportedError("a language model that generates classifies nothing; serve a classifier for that")

    # -- requests, in the caller's thread ----------------------------------------------------------

    def _try(self, row: Row, tenant: str) -> None:
        """One token through an adapter that nobody can name yet.

        Raises:
            UnsupportedError: with what happened.

        """
        if self._dead is not None:
            return
        sampling = Sampling(max_tokens=1, temperature=0.0)
        key = AdapterKey(tenant, "trial", 0, row.name)  # whose cache it is: nobody else's
        deadline = time.monotonic() + TRIAL
        request = Generation(id="trial", tenant=tenant, adapter=key, prompt=(0,), sampling=sampling, deadline=deadline)
        here = OwnThread()
        run = Run(request, row, here, self._tokenizer, self._ends)
        self._send(run)
        while not tried(run):
            if not here.wait(LOOK) and self._dead is not None and not here.wait(0.0):
                raise EngineError(f"the engine ended, and did not try the adapter: {self._dead}")

    async def _row(self, key: AdapterKey | None) -> Row | None:
        if key is None:
            return None
        row = self._adapters.there(key)
        if row is None:
            async with self._loaders.lane(key.namespace) as lane:
                row = await lane.run(lambda: self._adapters.row(key))
        return row

    def _send(self, run: Run) -> None:
        if self._dead is not None:
            raise EngineError(f"the engine does not take requests: {self._dead}")
        self._inbox.append(run)
        self._wake.set()
        if self._dead is not None:  # it ended in between, and may not have seen this one
            run.tell([Finish("error", error=self._dead)])

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the engine was stopped"
        try:
            while self._until is None or (self._work() and time.monotonic() < self._until):
                self._take_in()
                self._admit()
                if self._running:
                    self._step()
                else:
                    self._wake.wait(0.002 if self._parked else IDLE)
                    self._wake.clear()
        except BaseException as error:
            reason = f"the engine ended with {type(error).__name__}: {first_line(error)}"
            log.exception("the engine's thread ended")
        finally:
            self._dead = reason
            for run in [*self._running.values(), *self._suspects, *self._parked, *self._queue.items(), *self._inbox]:
                self._give_back(run)
                run.tell([run.finish("cancelled")])
            self._running.clear()
            self._inbox.clear()

    def _work(self) -> bool:
        return bool(self._running or self._suspects or self._parked or len(self._queue) or self._inbox)

    def _take_in(self) -> None:
        while self._inbox:
            run = self._inbox.popleft()
            self._queue.add(run.tenant, run)
        for run in [run for run in self._parked if run.guide is None or run.guide.waited()]:
            self._parked.remove(run)
            self._queue.add(run.tenant, run, first=True)
        now = time.monotonic()
        for run in [*self._running.values(), *self._suspects, *self._parked, *self._queue.items()]:
            if run.left:
                self._end(run, "cancelled")
            elif run.deadline is not None and now >= run.deadline:
                self._end(run, "deadline")
            elif run.guide is not None and run.guide.fault is not None:
                self._end(run, "grammar", run.guide.fault)

    def _end(self, run: Run, reason: Any, error: str | None = None) -> None:
        """Take a request out, wherever it is, and tell its stream."""
        if run.id in self._running:
            self._stop(run)
        elif run in self._suspects:
            self._suspects.remove(run)
        elif run in self._parked:
            self._parked.remove(run)
        else:
            self._queue.remove(run.tenant, run)
        run.tell([run.finish(reason, error)])

    def _stop(self, run: Run) -> None:
        """Let a request run no more; its adapter may leave the device."""
        assert self._batch is not None
        self._batch.cancel(run.id)
        del self._running[run.id]
        self._queue.ended(run.tenant)
        self._give_back(run)

    def _give_back(self, run: Run) -> None:
        if run.held is not None:
            self._adapters.residents.release(run.held)
            run.held = None

    def _admit(self) -> None:
        if self._suspects:
            if not self._running:
                self._start(self._suspects.popleft())
            return
        while len(self._running) > 1 and sum(map(self._size, self._running.values())) > self._room.pages:  # they grew
            self._put_back(self._victim(self._size) or next(reversed(self._running.values())))
        blocked: set[str] = set()  # tenants that have all that they get now
        crowded: set[str] = set()  # tenants whose next long request waits for room in the cache
        while tenants := [tenant for tenant in self._queue.turn() if tenant not in blocked]:
            tenant = tenants[0]
            run = self._queue.first_of(tenant, self._short) if tenant in crowded else self._queue.first(tenant)
            if run is None:
                blocked.add(tenant)
                continue
            lacking = self._lacking(run, bool(crowded))
            if lacking is None:
                self._queue.remove(tenant, run)
            elif not self._queue.running(tenant) and (victim := self._victim(lacking)) is not None:
                self._put_back(victim)
                blocked.add(victim.tenant)
            elif lacking == self._size and not self._short(run):
                crowded.add(tenant)
            else:
                blocked.add(tenant)

    def _lacking(self, run: Run, crowded: bool) -> Callable[[Run], int] | None:
        """Start a request; where it has no room, how much of what it lacks another one has."""
        if len(self._running) >= self._sizes.requests:
            return lambda other: 1
        if not self._room.fits(self._size(run), [self._size(other) for other in self._running.values()], crowded):
            return self._size
        return None if self._start(run) else lambda other: len(homes(other) & homes(run))

    def _size(self, run: Run) -> int:
        return self._room.size(len(run.tokens))

    def _short(self, run: Run) -> bool:
        return self._room.short(self._size(run))

    def _victim(self, weight: Callable[[Run], int]) -> Run | None:
        return newest_of_most([*self._running.values()], weight, self._queue.running)

    def _put_back(self, run: Run) -> None:
        tenant = run.tenant
        self._queue.add(tenant, run, first=True)
        self._stop(run)

    def _start(self, run: Run) -> bool:
        """Let a request run; False where there is no room for its adapter.

        One whose adapter has to be read again, or cannot be had, is told, and waits no longer.
        """
        assert self._batch is not None
        if run.row is not None:
            try:
                run.held = self._adapters.residents.hold(run.row)
            except GoneError:
                run.tell([Again()])
                return True
            except KilotuneError as error:
                run.tell([run.finish("error", first_line(error))])
                return True
            if run.held is None:
                return False
        run.begins()
        run.id = str(next(self._ids))
        self._running[run.id] = run
        self._queue.started(run.tenant)
        self._batch.add(run.id, run.tokens)
        return True

    # -- a step ----------------------------------------------------------------------------------

    def _step(self) -> None:
        assert self._batch is not None
        try:
            with self._adapters.residents.turns.stepping():
                self.cores.serve()
                began = time.monotonic()
                parts = self._batch.step()
        except Exception as error:
            log.exception("a step failed")
            self._failed(error)
            return
        self._pace.took(sum(part.tokens for part in parts), time.monotonic() - began)
        self._steps += 1
        probing = self._suspects or any(run.suspect for run in self._running.values())
        streams: dict[Any, list[tuple[Run, list[Any]]]] = {}
        for part in parts:
            run = self._running[part.id]
            run.took(part)
            self._queue.charge(run.tenant, part.tokens)
            if part.last:
                told = self._told(run, self._chosen.pop(part.id))
                streams.setdefault(run.loop, []).append((run, told))
        Run.tell_all(streams)
        if probing:
            for run in list(self._running.values()):
                run.suspect = False
                self._put_back(run)

    def _told(self, run: Run, choice: Choice) -> list[Any]:
        """What a new token means for its stream; ends the request where it is the last one."""
        if run.picker.idle:  # its grammar is at its end, or not done
            self._stop(run)
            if run.guide is None or run.guide.over:
                return [run.finish("stop")]
            run.guide.sit_out()
            self._parked.append(run)
            return []
        if not (choice.finite and run.finite):
            self._stop(run)
            return [run.finish("error", "the model's numbers are no longer finite with this adapter")]
        items, reason = run.push(choice)
        self._tokens += bool(run.made)
        if reason is not None:
            self._stop(run)
            items.append(run.finish(reason))
        return items

    def _failed(self, error: Exception) -> None:
        """After a step that failed: who was alone in it has failed, else each is tried by itself."""
        assert self._batch is not None
        runs = list(self._running.values())
        for run in runs:
            self._stop(run)
        self._batch.clear()
        self._chosen.clear()
        if len(runs) == 1:
            if runs[0].row is not None:
                self._adapters.residents.take_out(runs[0].row.home)
            why = first_line(error) if isinstance(error, UnsupportedError) else type(error).__name__
            runs[0].tell([runs[0].finish("error", f"the model failed: {why}")])
            self._warm(1)  # fails where the base alone cannot answer either, which ends the engine
            return
        for run in runs:
            run.suspect = True
        self._suspects.extend(runs)

    def _owner(self, request: str) -> bytes:
        running = self._running[request]
        return running.owner + self._adapters.cache_words.of(running.tenant)

    @contextlib.contextmanager
    def _around(self, parts: list[Part]) -> Iterator[None]:
        whose = [(self._running[part.id].held if part.id else None, part.tokens) for part in parts]
        route = self._adapters.residents.route(whose)
        with contextlib.nullcontext() if route is None else self._adapters.model.running(route):
            yield

    def _share(self, unread: dict[str, int], room: int) -> dict[str, int]:
        prompts = [Unread(name, run.tenant, unread[name]) for name, run in self._running.items() if name in unread]
        least = min(room, len(prompts))  # of which each has a turn
        given = share_out(prompts, max(least, min(room, self._pace.tokens(self._queue.tenants))))
        scored = [prompt for prompt in prompts if self._scoring(prompt.id) is not None]
        return share_scored(given, scored, most_tokens(self._vocabulary)) if scored else given

    def _scoring(self, request: str) -> PromptScores | None:
        return self._running[request].scoring

    def _choose(self, ids: list[str], logits: Tensor) -> Tensor:
        runs = [self._running[name] for name in ids]
        wait_for([run.guide for run in runs if run.guide], len(self._running) > 1, self._queue.tenants > 1)
        Run.look_all(runs)
        choices = choose(logits, [run.picker for run in runs])
        self._chosen = dict(zip(ids, choices, strict=True))
        return torch.tensor([choice.token for choice in choices], device=logits.device)
