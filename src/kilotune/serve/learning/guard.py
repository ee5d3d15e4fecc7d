"""Questions of general knowledge that hold a model to what its base says to them, while it learns from a user.

In each step of learning some of them are learned too: the KL divergence from the base along its own greedy answer.
Its gradient is 0 where nothing has changed, while that answer as labels would teach even an untouched model; and along
other texts than the base's own it would not be held where it goes. The questions for the gate are never learned.
"""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, final

from torch import Tensor

from ...config import AdapterConfig
from ...errors import ConfigError, ResourceError, UnsupportedError
from ...fleet.stepper.objectives import Distribution, Likely
from ...fleet.stepper.operations import Forward
from ...fleet.store import SharedVersion
from ...model.kept_rows import KeptRows
from ..engine.interface import AdapterKey, Engine, Finish, Generation, Sampling, Token
from .learner import Learner
from .lessons import Maker

__all__ = ["TOKENS", "Guard", "Guarded", "Row", "guard_lines", "said_by"]

TOKENS = 24  # of an answer
AT_ONCE = 16  # questions that are asked at once
BASES = 4  # models beneath whose words are kept
INPUTS = 64.0  # megabytes, for each of them, of what enters the last blocks
Row = dict[str, Any]


def guard_lines() -> list[dict[str, str]]:
    """The committed questions: ``asked``, and what each is ``for``, "study" or "gate"."""
    text = files(__package__).joinpath("guard.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def said_by(learner: Learner, model: str, row: Row, without: bool = False) -> Tensor:
    """What a model in training would say in the places of a row's labels: log-probabilities (places, vocabulary)."""
    told: Tensor = learner.submit(model, Forward([row], Distribution(), without=without)).result().logprobs[0]
    return told


@final
@dataclass(frozen=True, eq=False)
class Guarded:
    """The guard over one model: questions with its own answers, to learn and for the gate."""

    study: list[Row]
    gate: list[Row]
    inputs: KeptRows = field(default_factory=lambda: KeptRows(INPUTS))
    _said: dict[int, Likely] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ready(
        self,
        learner: Learner,
        namespace: str,
        config: AdapterConfig,
        on: SharedVersion | None,
        stay: Callable[[], None] = lambda: None,
    ) -> None:
        """Look at all rows that were not looked at yet, by a model that has learned nothing.

        Args:
            learner, namespace, config, on: by which, see :meth:`Learner.open`, which says what is raised.
            stay: is called before each row; may raise: the next call goes on from there.

        """
        with self._lock:
            for keep in (self.inputs, 0.0):  # a model that hands more than one tensor from block to block keeps none
                rows = [row for row in (*self.gate, *self.study) if id(row) not in self._said]
                if not rows:
                    return
                model = f"guard-{uuid.uuid4().hex}"
                learner.open(model, namespace, config, on=on, keep_inputs=keep)
                try:
                    for row in rows:
                        stay()
                        self._said[id(row)] = Likely.of(said_by(learner, model, row, without=True))
                except UnsupportedError:
                    if not keep:
                        raise
                finally:
                    learner.close(model)

    def said(self, row: Row) -> Likely:
        """What is beneath a model that stands on this one says along a row of these, once it is ready."""
        return self._said[id(row)]


@final
class Guard:
    """The guard's questions for one tokenizer.

    Args:
        make: makes rows of a line of a training file.
        engine: answers.

    Raises:
        ConfigError: the model takes none of them.

    """

    def __init__(self, make: Maker, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self._prompts: dict[str, list[list[int]]] = {"study": [], "gate": []}
        self._over: OrderedDict[str, Guarded] = OrderedDict()
        self.texts: list[str] = []
        fault: ConfigError | None = None
        for given in guard_lines():
            self.texts.append(given["asked"])
            asked = [{"role": "user", "content": given["asked"]}, {"role": "assistant", "content": "Yes."}]
            try:
                row = make({"messages": asked}, "supervised").rows[0]
            except ConfigError as error:  # too long for a tiny model
                fault = error
                continue
            first = next(place for place, label in enumerate(row["labels"]) if label != -100)
            if first + TOKENS <= engine.max_length:
                self._prompts[given["for"]].append(row["input_ids"][:first])
        if not all(self._prompts.values()):
            raise ConfigError(f"learning from feedback: the model is too short for the guard's questions: {fault}")

    def over(self, namespace: str, on: SharedVersion | None, stay: Callable[[], None] = lambda: None) -> Guarded:
        """With the answers of the base, or of a shared adapter. stay: is called before each question; may raise.

        Raises:
            ResourceError: the engine answers nothing now.

        """
        key = "" if on is None else on.sha256
        with self._lock:
            if key not in self._over:
                self._over[key] = asyncio.run(self._answered(namespace, on, stay))
            self._over.move_to_end(key)
            while len(self._over) > BASES:
                self._over.popitem(last=False)
            return self._over[key]

    async def _answered(self, namespace: str, on: SharedVersion | None, stay: Callable[[], None]) -> Guarded:
        beneath = None if on is None else AdapterKey.shared(on)
        turns, found = asyncio.Semaphore(AT_ONCE), {}

        async def answer(prompt: list[int]) -> Row | None:
            async with turns:
                stay()
                return await self._answer(prompt, namespace, beneath)

        for use, prompts in self._prompts.items():
            rows = await asyncio.gather(*map(answer, prompts))
            found[use] = [row for row in rows if row is not None]
            if not found[use]:
                raise ConfigError("learning from feedback: the model answers none of the guard's questions")
        return Guarded(found["study"], found["gate"])

    async def _answer(self, prompt: list[int], namespace: str, beneath: AdapterKey | None) -> Row | None:
        """A question and the greedy answer; None: there is none."""
        sampling = Sampling(max_tokens=TOKENS, temperature=0.0)
        request = Generation(id="guard", tenant=namespace, adapter=beneath, prompt=tuple(prompt), sampling=sampling)
        said: list[int] = []
        async for item in self._engine.generate(request):
            if isinstance(item, Token):
                said.append(item.id)
            elif isinstance(item, Finish) and item.reason not in ("stop", "length"):
                raise ResourceError(f"the engine does not answer the guard's questions now: {item.reason}")
        return {"input_ids": [*prompt, *said], "labels": [*([-100] * len(prompt)), *said]} if said else None
