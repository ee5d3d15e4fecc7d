"""The engine for encoders and classifiers: texts of whoever waits run as rows of one batch, each with its own adapter.

A batch takes what waits, by turns of tenants, as long as its padded tokens stay within ``batch_tokens`` and within what
the time allows that a batch is to take (pace.py); it never waits for more to come. A classifier's head is a part of its
adapter where the adapter has one (``modules_to_save``). A batch that fails is run again row by row, so that only those
fail that fail alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import AdapterError, ConfigError, ResourceError, UnsupportedError, first_line, type_name
from .device_adapters import GoneError, Held, Row
from .fairness import FairQueue
from .interface import AdapterKey, Engine, EngineError, EngineStats, Finish, Generation, Token, Vector
from .lanes import Lanes
from .pace import Pace
from .tenant_adapters import AdapterRegistry

__all__ = ["EncoderEngine", "Pooling", "pooling_of"]

LOADERS, EACH = 4, 2  # threads that read adapters, and how many of them one tenant has at most
IDLE = 0.05
TRIAL = 60.0  # seconds that an adapter's trial may wait for its turn
RELOADS = 3  # times that an adapter whose form made way is read again for one text
log = logging.getLogger("kilotune.serve")


@final
class Pooling:
    """How a text's tokens become one vector: "mean" of them, the first one ("cls"), or the last one ("last").

    normalize: to length 1.
    """

    WAYS = ("mean", "cls", "last")

    def __init__(self, way: str = "mean", normalize: bool = False) -> None:
        if way not in self.WAYS:
            raise ConfigError(f"pooling: expected one of {list(self.WAYS)}, got {way!r}")
        self.way, self.normalize = way, normalize

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden: (rows, tokens, features), padded on the right; mask: (rows, tokens). Gives (rows, features)."""
        wide, real = hidden.float(), mask.unsqueeze(-1).float()
        if self.way == "mean":
            pooled = (wide * real).sum(1) / real.sum(1).clamp_min(1.0)
        elif self.way == "cls":
            pooled = wide[:, 0]
        else:
            pooled = wide[torch.arange(wide.shape[0], device=wide.device), mask.sum(1).long() - 1]
        return F.normalize(pooled, dim=-1) if self.normalize else pooled


def pooling_of(folder: str | Path) -> Pooling:
    """What the files of sentence-transformers in a model's folder say; the mean where there are none.

    Raises:
        UnsupportedError: a pooling that is none of ours.

    """
    folder = Path(folder)
    listed = folder / "modules.json"
    if not listed.is_file():
        return Pooling()
    modules = json.loads(listed.read_text(encoding="utf-8"))
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    pooled = [module for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"]
    if strange := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise UnsupportedError(f"{listed}: modules of sentence-transformers that are not served: {', '.join(strange)}")
    way = "mean"
    if pooled:
        values = json.loads((folder / str(pooled[0].get("path", "")) / "config.json").read_text(encoding="utf-8"))
        modes = {
            "pooling_mode_mean_tokens": "mean",
            "pooling_mode_cls_token": "cls",
            "pooling_mode_lasttoken": "last",
        }
        on = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        if len(on) != 1 or on[0] not in modes:
            raise UnsupportedError(f"{folder}: pooling {on}; served are one of {list(modes)}")
        way = modes[on[0]]
    return Pooling(way, "Normalize" in kinds)


@final
class _Item:
    """One text."""

    def __init__(self, tenant: str, row: Row | None, tokens: list[int]) -> None:
        self.tenant, self.row, self.tokens = tenant, row, tokens
        self.done: Future[Vector] = Future()
        self.held: Held | None = None

    def fail(self, error: BaseException) -> None:
        if self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)

    def give(self, vector: Vector) -> None:
        if self.done.set_running_or_notify_cancel():
            self.done.set_result(vector)


@final
class EncoderEngine(Engine):
    """See :class:`Engine`; for encoders and sequence classifiers of transformers.

    Args:
        model: the model that ``adapters`` was made with. One whose class is for sequence classification classifies;
            any other that gives hidden states embeds.
        adapters: the adapters of all tenants.
        pooling: of an encoder's tokens.
        pad: the token to pad with; by default the model's own.
        batch_tokens: of one batch, padding among them.
        max_length: tokens of a text; by default what the model can take.

    """

    generates = False

    def __init__(
        self,
        model: Any,
        adapters: AdapterRegistry,
        *,
        pooling: Pooling | None = None,
        pad: int | None = None,
        batch_tokens: int = 8192,
        max_length: int | None = None,
    ) -> None:
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens: expected at least 1, got {batch_tokens!r}")
        base: Any = adapters.model.get_base_model()
        if model is not base and model is not adapters.model:
            raise ConfigError("the engine's model is not the one that its adapters were made with")
        self._model, self._adapters = base, adapters
        config = base.config
        self._classifies = type(base).__name__.endswith("ForSequenceClassification")
        self.embeds = not self._classifies
        names = getattr(config, "id2label", None) or {}
        self.labels = tuple(str(names[i]) for i in sorted(names)) if self._classifies else None
        own_pad = getattr(config, "pad_token_id", None)
        self._pad = pad if pad is not None else own_pad if own_pad is not None else 0
        if self._classifies and getattr(config, "is_decoder", False) and own_pad is None:
            config.pad_token_id = self._pad
        longest = getattr(config, "max_position_embeddings", None) or batch_tokens
        begin = self._pad + 1 if str(config.model_type) in OFFSET_POSITIONS else 0
        self.max_length = min(longest - begin, batch_tokens, *([] if max_length is None else [max_length]))
        self._vocabulary = int(config.vocab_size)
        self._pooling, self._pace = pooling or Pooling(), Pace(batch_tokens)
        self._queue: FairQueue[_Item] = FairQueue()
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._loaders = Lanes("kilotune-adapters", LOADERS, EACH)
        self._thread: threading.Thread | None = None
        self._until: float | None = None
        self._dead: str | None = "the engine has not been started"
        self._running = self._tokens = self._steps = 0

    # -- Engine ----------------------------------------------------------------------------------

    def start(self) -> None:
        if self._thread is not None:
            return
        self._warm()
        self._dead, self._until = None, None
        self._adapters.trial = self._try
        self._thread = threading.Thread(target=self._run, name="kilotune-encoder", daemon=True)
        self._thread.start()

    def _warm(self) -> None:
        """Run the base alone."""
        with self._adapters.residents.turns.stepping(), torch.no_grad():
            self._forward([[1, 1]])

    def stop(self, drain: float = 0.0) -> None:
        if self._thread is None:
            return
        self._until = time.monotonic() + drain
        self._adapters.trial = None
        self._wake.set()
        self._thread.join()
        self._thread = None
        self._loaders.close()

    def healthy(self) -> str | None:
        return self._dead

    def stats(self) -> EngineStats:
        residents = self._adapters.residents
        with self._lock:
            waiting = len(self._queue)
        return EngineStats(
            waiting=waiting,
            running=self._running,
            tokens=self._tokens,
            steps=self._steps,
            cache=0.0,
            resident=residents.resident,
            slots=residents.room,
        )

    async def generate(self, request: Generation) -> AsyncIterator[Token | Finish]:
        raise UnsupportedError("an encoder generates nothing; serve a causal language model for that")
        yield  # makes it an iterator

    async def embed(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        if not self.embeds:
            raise UnsupportedError(f"{type(self._model).__name__} classifies, and gives no embeddings")
        return await self._all(tenant, adapter, texts)

    async def classify(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        if not self._classifies:
            raise UnsupportedError(f"{type(self._model).__name__} gives embeddings, and classifies nothing")
        return await self._all(tenant, adapter, texts)

    def _try(self, row: Row, tenant: str) -> None:
        """A text of one token through an adapter that nobody can name yet.

        Raises:
            UnsupportedError: with what happened.

        """
        item = _Item(tenant, row, [1])
        with self._lock:
            if self._dead is not None:
                return
            self._queue.add(tenant, item)
        self._wake.set()
        try:
            item.done.result(TRIAL)
        except GoneError as error:
            raise ResourceError("adapters of too many forms are in use; try again later") from error
        except AdapterError as error:
            raise UnsupportedError(str(error)) from error
        except TimeoutError as error:
            item.done.cancel()
            raise ResourceError("the engine did not come to try the adapter; try again later") from error

    async def _all(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        for i, text in enumerate(texts):
            if not 1 <= len(text) <= self.max_length or any(not 0 <= t < self._vocabulary for t in text):
                raise ConfigError(
                    f"text {i}: expected 1 to {self.max_length} tokens, each in 0 ... {self._vocabulary - 1}, got "
                    f"{len(text)}"
                )
        for _ in range(RELOADS):
            try:
                return await self._once(tenant, adapter, texts)
            except GoneError:
                continue
        raise ResourceError("adapters of too many forms are in use; try again later")

    async def _once(self, tenant: str, adapter: AdapterKey | None, texts: Sequence[Sequence[int]]) -> list[Vector]:
        row = None if adapter is None else self._adapters.there(adapter)
        if adapter is not None and row is None:
            async with self._loaders.lane(adapter.namespace) as lane:
                row = await lane.run(lambda: self._adapters.row(adapter))
        items = [_Item(tenant, row, list(text)) for text in texts]
        with self._lock:
            if self._dead is not None:
                raise EngineError(f"the engine does not take requests: {self._dead}")
            for item in items:
                self._queue.add(tenant, item)
        self._wake.set()
        try:
            return list(await asyncio.gather(*(asyncio.wrap_future(item.done) for item in items)))
        finally:
            for item in items:
                item.done.cancel()

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the engine was stopped"
        try:
            while self._until is None or (len(self._queue) and time.monotonic() < self._until):
                if batch := self._take():
                    self._serve(batch)
                else:
                    self._wake.wait(IDLE)
                    self._wake.clear()
        except BaseException as error:
            reason = f"the engine ended with {type(error).__name__}: {first_line(error)}"
            log.exception("the engine's thread ended")
        finally:
            with self._lock:
                self._dead = reason
                left = self._queue.items()
            for item in left:
                item.fail(EngineError(reason))

    def _take(self) -> list[_Item]:
        """What runs next: of each tenant in turn, with their adapters held."""
        batch: list[_Item] = []
        longest = 0
        with self._lock:
            blocked: set[str] = set()
            most = self._pace.tokens(self._queue.tenants)
            while tenants := [tenant for tenant in self._queue.turn() if tenant not in blocked]:
                item = self._queue.first(tenants[0])
                if item.done.cancelled():
                    self._queue.pop(item.tenant)
                    continue
                if batch and max(longest, len(item.tokens)) * (len(batch) + 1) > most:
                    break
                try:
                    item.held = None if item.row is None else self._adapters.residents.hold(item.row)
                except Exception as error:  # of this one alone
                    self._queue.pop(item.tenant)
                    item.fail(error)
                    continue
                if item.row is not None and item.held is None:
                    blocked.add(item.tenant)
                    continue
                self._queue.pop(item.tenant)
                self._queue.started(item.tenant)
                self._queue.charge(item.tenant, len(item.tokens))
                longest = max(longest, len(item.tokens))
                batch.append(item)
        return batch

    def _serve(self, batch: list[_Item]) -> None:
        self._running = len(batch)
        failed: list[_Item] = []
        try:
            try:
                self._answer(batch)
            except Exception as error:
                log.exception("a batch failed")
                failed = [item for item in batch if not self._alone(item)] if len(batch) > 1 else []
                if len(batch) == 1:
                    batch[0].fail(AdapterError(f"the model failed: {type_name(error)}"))
                    failed = batch
        finally:
            self._running = 0
            for item in batch:
                if item.held is not None:
                    self._adapters.residents.release(item.held)
            with self._lock:
                for item in batch:
                    self._queue.ended(item.tenant)
        for item in failed:
            if item.row is not None and not item.row.home.closed:
                self._adapters.residents.take_out(item.row.home)
        if failed:
            self._warm()  # fails where the base alone cannot answer either, which ends the engine

    def _alone(self, item: _Item) -> bool:
        """Whether an item can be answered by itself."""
        try:
            self._answer([item])
        except Exception as error:
            item.fail(AdapterError(f"the model failed: {type_name(error)}"))
            return False
        return True

    def _answer(self, batch: list[_Item]) -> None:
        residents = self._adapters.residents
        with residents.turns.stepping(), torch.no_grad():
            began = time.monotonic()
            route = residents.route([(item.held, 1) for item in batch], tokens=False)
            with contextlib.nullcontext() if route is None else self._adapters.model.running(route):
                values = self._forward([item.tokens for item in batch])
        self._pace.took(len(batch) * max(len(item.tokens) for item in batch), time.monotonic() - began)
        self._steps += 1
        finite = torch.isfinite(values).all(-1).tolist()
        for item, own, good in zip(batch, values.tolist(), finite, strict=True):
            self._tokens += len(item.tokens)
            if good:
                item.give(Vector(tuple(own), len(item.tokens)))
            else:
                item.fail(AdapterError("the model's numbers are no longer finite with this adapter"))

    def _forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """(rows, features) float32."""
        device = next(self._model.parameters()).device
        size = max(map(len, texts))
        ids = torch.tensor([[*text, *[self._pad] * (size - len(text))] for text in texts], device=device)
        lengths = torch.tensor([len(text) for text in texts], device=device)
        mask = (torch.arange(size, device=device) < lengths.unsqueeze(1)).long()
        output = self._model(input_ids=ids, attention_mask=mask)
        if self._classifies:
            logits: Tensor = output.logits
            return logits.float()
        return self._pooling(output.last_hidden_state, mask)


# Their position numbers begin after the padding's.
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")
