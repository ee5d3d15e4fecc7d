"""A thread that trains adapters beside an engine that answers, over one copy of the base's weights.

::

    learner = Learner(twin_of(base), registry, engine)        the twin from before the registry wrapped the base
    learner.start()
    learner.open("job-1", "ann", VeraConfig(r=64, target_modules="all-linear"))
    scored = learner.submit("job-1", ForwardBackward(rows))   a Future; from any thread
    learner.submit("job-1", OptimStep(Adam(rate=1e-2)))
    async for item in learner.sample("job-1", prompt, sampling):
        ...                                                    the engine answers with the numbers that there are now

What fails, fails alone: an operation, or the model that it was for. Memory that runs out in a pass is the operation's
error too; the engine has its own, which it took when it began.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast, final

import torch
from torch import nn

from ..._ui.sizes import readable_bytes
from ...config import AdapterConfig
from ...errors import AdapterError, ConfigError, KilotuneError, ResourceError, StoreError, first_line
from ...fleet.stepper.operations import Operation, Save, State
from ...fleet.stepper.stepper import Stepper
from ...fleet.store import Record, SharedVersion
from ...fleet.store.documents import QuotaError
from ...model.kept_rows import KeptRows
from ..engine.cores import Cores
from ..engine.interface import Engine, Generation, Item, Sampling
from ..engine.tenant_adapters import AdapterRegistry
from .share import Share

__all__ = ["Learner", "LearnerStats", "LearningSettings", "NoRoomError"]

T = TypeVar("T")
_Ask = Callable[[Sequence[int], Sampling, float | None], AsyncIterator[Item]]
SIZES = 256  # configurations whose models' sizes are remembered
AT_ONCE = 16  # samples of one model that are made at once
IDLE = 0.05  # seconds between looks at whether something is to do, or the engine has become idle
log = logging.getLogger("kilotune.serve")


@final
@dataclass(frozen=True, kw_only=True)
class LearningSettings:
    """How training goes on beside answers.

    share: cores that training has at least, while something is answered (and at most); all that is idle else.
    threads: of a pass. pass_tokens: of one pass, the longest that an answer can wait for. models: that may be open.
    """

    share: float = 0.25
    threads: int = 1
    pass_tokens: int = 512
    models: int = 256

    def __post_init__(self) -> None:
        least = {"threads": self.threads, "pass_tokens": self.pass_tokens, "models": self.models}
        faults = [f"{name}: expected at least 1, got {value}" for name, value in least.items() if value < 1]
        if faults:
            raise ConfigError("; ".join(faults))


@final
class LearnerStats(NamedTuple):
    """A learner at one moment. models: open. passes, seconds (of the processor), failed, tokens: since the start.

    tokens: of all passes, filled up to the longest row. waited: seconds in which there was something to do and the
    engine had its share.
    """

    models: int
    passes: int
    seconds: float
    waited: float
    failed: int
    tokens: int


@final
class _Opened(NamedTuple):
    """A model in training. namespace: whose. on: what it stands on. size: bytes that it takes."""

    namespace: str
    on: SharedVersion | None
    size: int


@final
class NoRoomError(KilotuneError):
    """Other models of the namespace take what this one needs; it can be opened when one of them is closed."""


@final
class Learner:
    """See the module. All methods may be called from any thread.

    Args:
        twin: a second tree over the weights of the model that answers (:func:`~kilotune.serve.twin.twin_of`).
        adapters: of the engine.
        engine: that answers; it says whether it has something to do.
        settings: see there.
        cores: of the engine, where it shares them.

    Attributes:
        embedding: the twin's, of tokens, without adapters.

    """

    def __init__(
        self,
        twin: nn.Module,
        adapters: AdapterRegistry,
        engine: Engine,
        settings: LearningSettings | None = None,
        cores: Cores | None = None,
    ) -> None:
        self.settings = settings or LearningSettings()
        self._adapters, self._engine = adapters, engine
        self.embedding: nn.Module = cast(Any, twin).get_input_embeddings()
        self._stepper = Stepper(twin, tokens=self.settings.pass_tokens)
        self._share = Share(self.settings.share)
        self._cores = Cores() if cores is None else cores
        self._cores.training = self.settings.threads
        self._gpu = any(tensor.is_cuda for tensor in twin.parameters())
        self._opened: dict[str, _Opened] = {}
        self._sizes: dict[str, int] = {}
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._dead: str | None = "the learner has not been started"
        self._stopping = False
        self._passes = self._failed = 0
        self._seconds = self._waited = 0.0

    def start(self) -> None:
        """Be ready to train; returns when that is so."""
        if self._thread is not None:
            return
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="kilotune-learner", daemon=True)
        self._thread.start()
        ready.result()

    def stop(self) -> None:
        """End after the pass that runs; what waits is cancelled."""
        if self._thread is None:
            return
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._thread = None

    def healthy(self) -> str | None:
        """None, or why it trains no more."""
        return self._dead

    def stats(self) -> LearnerStats:
        """How it stands."""
        return LearnerStats(
            len(self._opened), self._passes, self._seconds, self._waited, self._failed, self._stepper.ran
        )

    # -- models ----------------------------------------------------------------------------------

    def open(
        self,
        name: str,
        namespace: str,
        config: AdapterConfig,
        *,
        seed: int = 0,
        on: SharedVersion | None = None,
        start: Record | None = None,
        state: State | None = None,
        keep_inputs: float | KeptRows = 0.0,
        most: int | None = None,
    ) -> None:
        """Begin with a model of a namespace; waits until it is there.

        Args:
            name: nobody else's, in any namespace.
            namespace: whose it is: whom its samples count for.
            config: of its adapter.
            seed: of its start and its dropout.
            on: the shared version that it stands on.
            start: the version that it goes on from.
            state: what it was in an earlier run, to go on from.
            keep_inputs: see :meth:`Stepper.open`.
            most: bytes that all models of the namespace may take, with this one.

        Raises:
            AdapterError: the name is taken, or ``on`` is not there. ConfigError, TargetError, UnsupportedError: such an
                adapter cannot be trained here. ResourceError: too many are open. StoreError: the store, or it ended.
            QuotaError: it takes more than ``most`` by itself. NoRoomError: beside those that are open now.

        """
        below = None if on is None else self._adapters.shared(namespace, on)

        def begin() -> None:
            if len(self._opened) >= self.settings.models:
                raise ResourceError(f"open({name!r}): {len(self._opened)} models are in training; close one first")
            size = self._stepper.bytes_of(config)
            self._check_room(namespace, size, most)
            self._stepper.open(name, config, seed=seed, on=below, start=start, state=state, keep_inputs=keep_inputs)
            self._opened[name] = _Opened(namespace, on, size)

        self._call(begin).result()

    def check_size(self, config: AdapterConfig, most: int) -> None:
        """See that a model of this configuration takes no more than so many bytes while it is open.

        Raises:
            QuotaError: it takes more. And what :meth:`open` raises of a configuration.

        """
        key = repr(config)
        size = self._sizes.get(key)
        if size is None:  # else no pass need be waited for
            size = self._call(lambda: self._stepper.bytes_of(config)).result()
            if len(self._sizes) >= SIZES:
                self._sizes.clear()
            self._sizes[key] = size
        _check_size(size, most)

    def _check_room(self, namespace: str, size: int, most: int | None) -> None:
        if most is None:
            return
        _check_size(size, most)
        taken = sum(one.size for one in self._opened.values() if one.namespace == namespace)
        if taken + size > most:
            raise NoRoomError(
                f"the model takes {readable_bytes(size)} in training, and others of {namespace!r} have "
                f"{readable_bytes(taken)} of the {readable_bytes(most)} allowed"
            )

    def close(self, name: str) -> None:
        """Forget a model; what it was told and has not done ends with an error.

        Raises:
            AdapterError: there is none.

        """

        def end() -> None:
            self._stepper.close(name)
            del self._opened[name]

        self._call(end).result()

    def submit(self, name: str, operation: Operation, number: int | None = None) -> Future[Any]:
        """Tell a model to do something; see :meth:`Stepper.submit`."""
        self._check_alive()
        asked = self._stepper.submit(name, operation, number)
        asked.add_done_callback(self._counted)
        self._wake.set()
        return asked

    async def sample(
        self, name: str, prompt: Sequence[int], sampling: Sampling, deadline: float | None = None
    ) -> AsyncIterator[Item]:
        """What the engine answers with a model's numbers as they are when all that it was told before is done.

        Raises:
            AdapterError: there is no such model. StoreError: the engine or the learner has ended.

        """
        async with self._answering(name) as ask:
            async for item in ask(prompt, sampling, deadline):
                yield item

    async def samples(self, name: str, asked: Sequence[tuple[Sequence[int], Sampling]]) -> list[list[Item]]:
        """Whole answers to (prompt, how), all with the same numbers; see :meth:`sample`."""
        gate = asyncio.Semaphore(AT_ONCE)
        async with self._answering(name) as ask:

            async def one(prompt: Sequence[int], sampling: Sampling) -> list[Item]:
                async with gate:
                    return [item async for item in ask(prompt, sampling, None)]

            return await asyncio.gather(*(one(prompt, sampling) for prompt, sampling in asked))

    @asynccontextmanager
    async def _answering(self, name: str) -> AsyncIterator[_Ask]:
        """What asks the engine with a model's numbers as they are now, until the context is left."""
        saved, opened = self.submit(name, Save()), self._opened.get(name)
        contents = await asyncio.wrap_future(saved)
        if opened is None:
            raise AdapterError(f"the model {name!r} was closed")
        with self._adapters.unstored(opened.namespace, name, contents, opened.on) as key:

            def ask(prompt: Sequence[int], sampling: Sampling, deadline: float | None) -> AsyncIterator[Item]:
                return self._engine.generate(
                    Generation(
                        id=f"sample-{name}",
                        tenant=opened.namespace,
                        adapter=key,
                        prompt=tuple(prompt),
                        sampling=sampling,
                        deadline=deadline,
                    )
                )

            yield ask

    @property
    def longest(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._engine.max_length

    def _counted(self, asked: Future[Any]) -> None:
        self._failed += not asked.cancelled() and asked.exception() is not None

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise StoreError(f"nothing is trained: {self._dead}")

    def _call(self, call: Callable[[], T]) -> Future[T]:
        """Have the learner's thread do something between two passes."""
        self._check_alive()
        made: Future[T] = Future()
        self._calls.append((call, made))
        self._wake.set()
        if self._dead is not None:  # it ended in between, and may not have seen this
            self._cancel()
        return made

    def _cancel(self) -> None:
        while self._calls:
            _, asked = self._calls.popleft()
            asked.set_exception(StoreError(f"nothing is trained: {self._dead}"))

    # -- the thread --------------------------------------------------------------------------------

    def _run(self, ready: Future[None]) -> None:
        reason = "the learner was stopped"
        try:
            with self._stepper:
                self._dead = None
                ready.set_result(None)
                while not self._stopping:
                    self._turn()
        except BaseException as error:
            reason = f"the learner ended with {type(error).__name__}: {first_line(error)}"
            log.exception("the learner's thread ended")
            if not ready.done():
                ready.set_exception(error)
        finally:
            self._dead = reason
            self._opened.clear()
            self._cancel()

    def _turn(self) -> None:
        while self._calls:
            call, asked = self._calls.popleft()
            try:
                asked.set_result(call())
            except Exception as error:
                asked.set_exception(error)
        if not self._stepper.waits:
            self._wake.wait(IDLE)
            self._wake.clear()
            return
        busy = self._busy()
        if (left := self._share.wait(busy)) > 0:
            began = time.monotonic()
            self._wake.wait(min(left, IDLE))
            self._wake.clear()
            self._waited += time.monotonic() - began
            return
        self._pass(busy)

    def _busy(self) -> bool:
        stats = self._engine.stats()
        return stats.running + stats.waiting > 0

    def _pass(self, busy: bool) -> None:
        """One pass, and what it took of the processor: on a CPU of this thread, which computes with `threads` of it."""
        wall, own = time.monotonic(), time.thread_time()
        with self._cores.learning():
            self._stepper.work()
        if self._gpu:
            torch.cuda.synchronize()
            took = time.monotonic() - wall
        else:
            took = (time.thread_time() - own) * self.settings.threads
        self._share.took(took, busy)
        self._passes += 1
        self._seconds += took


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise QuotaError(
            f"the model takes {readable_bytes(size)} in training, and {readable_bytes(most)} are allowed; train one of "
            "a smaller rank, or on fewer layers"
        )
