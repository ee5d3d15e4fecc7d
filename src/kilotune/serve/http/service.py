"""What the routes work with: an engine, its adapters, a tokenizer, and what each request is allowed."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, final

from ...adapter_files.names import composed
from ...errors import KilotuneError
from ...fleet.store import Contents, SharedVersion, Version
from ...fleet.store.adapter_store import Adapter, Which
from ..engine.interface import AdapterKey, Engine, Generation, Sampling
from ..engine.lanes import Lanes
from ..learning.feedback import FeedbackRules
from ..learning.training import Training
from ..learning.users import LIVE, PERSONAL, model_of
from .admission import Gate
from .chat_templates import OwnTemplate
from .http_errors import ApiError, of_library
from .json_pieces import Writing
from .keys import Key, Keyring
from .metrics import Metrics
from .prompts import Prompts
from .settings import ServeSettings
from .tracing import tracer

__all__ = ["Catalogue", "Meant", "Service", "hiding", "namespace_of", "others", "seed_of"]

T = TypeVar("T")
THREADS, EACH = 32, 8  # that wait for the store, and how many of them one namespace takes at most
PUTS, PUTS_EACH = 4, 1  # puts that are at work at a time: they compute, and answers are to have the processor
JUDGED = 1024  # adapters whose own files are known
PATIENCE = 20.0  # seconds that a request waits for the store
RULES = 1.0  # seconds between looks at a namespace's rules of feedback
AWAY = 10.0  # the same, where the store does not answer
RULED = 1024  # namespaces whose rules are known


class Catalogue(Protocol):
    """The adapters of all namespaces, as :class:`~kilotune.serve.engine.tenant_adapters.AdapterRegistry` has them.

    All methods are called from worker threads, and raise as those of :class:`~kilotune.fleet.AdapterStore`.
    """

    def resolve(self, namespace: str, name: str, which: Which) -> AdapterKey: ...
    def settle(self, namespace: str, on: str) -> SharedVersion: ...
    def check(self, namespace: str, name: str, adapter: Adapter, on: SharedVersion | None = None) -> Contents: ...
    def keep(
        self,
        namespace: str,
        name: str,
        contents: Contents,
        *,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        alias: str | None = None,
        on: SharedVersion | None = None,
    ) -> tuple[Version, bool]: ...
    def load(self, key: AdapterKey) -> None: ...
    def own_files(self, key: AdapterKey) -> Mapping[str, bytes]: ...
    def info(self, namespace: str, name: str, which: Which = None) -> Version: ...
    def versions(self, namespace: str, name: str) -> list[Version]: ...
    def aliases(self, namespace: str, name: str) -> dict[str, int]: ...
    def ls(
        self,
        namespace: str,
        pattern: str | None = None,
        *,
        tags: Sequence[str] = (),
        after: str | None = None,
        limit: int | None = None,
    ) -> list[Version]: ...
    def rm(self, namespace: str, name: str, which: Which = None, *, force: bool = False) -> int: ...
    def roll_out(self, namespace: str, alias: str, versions: Mapping[str, Which]) -> dict[str, int]: ...
    def roll_back(self, namespace: str, alias: str, names: Iterable[str]) -> dict[str, int]: ...
    def unalias(self, namespace: str, name: str, alias: str) -> None: ...
    def store_state(self) -> str | None: ...
    def close(self) -> None: ...


@final
@dataclass(frozen=True)
class Meant:
    """What a request's ``model`` names. model: as the request has it; adapter: None for the base alone. own: the
    adapter's own chat template, None where its chats are in the base's."""

    model: str
    adapter: AdapterKey | None
    own: OwnTemplate | None = None


@final
class Service:
    """One base, its engine, and everybody's adapters."""

    def __init__(
        self, engine: Engine, adapters: Catalogue, prompts: Prompts, keys: Keyring, settings: ServeSettings, base: str
    ) -> None:
        """base: what requests call the base alone."""
        self.engine, self.adapters, self.prompts, self.keys = engine, adapters, prompts, keys
        self.settings, self.base = settings, base
        self.gate = Gate(settings.max_requests, settings.max_requests_per_tenant)
        self.puts = Gate(settings.max_puts, settings.max_puts_per_tenant, "puts")
        self.putting = Lanes("kilotune-puts", PUTS, PUTS_EACH)
        self.metrics = Metrics(settings.metrics_tenants, settings.metrics_adapters, base, engine.stats)
        self.created = int(time.time())
        self._judged: OrderedDict[AdapterKey, OwnTemplate | None] = OrderedDict()
        self._rules: OrderedDict[str, tuple[float, FeedbackRules | None]] = OrderedDict()
        self.leaving = False  # the process was told to end, and takes requests still
        self.draining = False  # takes no requests for answers
        self.ending = False  # the process was told to end: nothing new is taken
        self.training: Training | None = None  # files and jobs, where the service trains
        self.notes: tuple[str, ...] = ()  # what to tell of the base, once there is a log
        self.tracer = tracer(settings.telemetry)
        self._asking = Lanes("kilotune-store", THREADS, EACH)
        self.writing = Writing()

    def close(self) -> None:
        """Let go of the threads and the store."""
        if self.training is not None:
            self.training.close()
        self.putting.close()
        self._asking.close()
        self.prompts.close()
        self.adapters.close()

    # -- the store -----------------------------------------------------------------------------------

    async def ask(self, namespace: str, call: Callable[[], T], param: str | None = None) -> T:
        """Run a call of :class:`Catalogue` beside the loop, in a thread of this namespace's.

        Raises:
            ApiError: what the store says, in HTTP's terms; also where it says nothing for too long.

        """
        asked = False
        try:
            async with asyncio.timeout(PATIENCE), self._asking.lane(namespace) as lane:
                asked = True
                return await lane.run(call)
        except TimeoutError:
            why = "has not answered" if asked else f"was not asked: {EACH} earlier requests have waited for it"
            told = f"the store of adapters {why} within {PATIENCE:g} s; try again"
            raise ApiError(503, told, code="store_unavailable", retry_after=5) from None
        except KilotuneError as error:
            raise of_library(error, param) from error

    async def meant(self, caller: Key, model: str, asked: Sequence[str] | None = None) -> Meant:
        """What ``model`` names for this caller: the base, an adapter of the caller's own namespace, or their own.

        asked: what the user says, which may be nothing that their own model learned of; None: what it is as a whole.
        """
        if model == self.base:
            return Meant(model, None)
        namespace, (name, which) = namespace_of(caller), self.split(model)
        if model == PERSONAL and self.training is not None:
            return await self._personal(caller, asked)
        if others(caller, name):
            raise self._unknown(model, f"there is no adapter {name!r}")
        try:
            key = await self.ask(namespace, lambda: self.adapters.resolve(namespace, name, which), "model")
        except ApiError as error:
            if error.status != 404:
                raise
            raise self._unknown(model, hiding(caller, name, error).message) from error
        return Meant(model, key, await self._own(key))

    def _unknown(self, model: str, why: str) -> ApiError:
        told = f"the model {model!r} does not exist: {why}"
        return ApiError(404, told, param="model", code="model_not_found")

    async def _personal(self, caller: Key, asked: Sequence[str] | None) -> Meant:
        """A user's own model: its live version, or what is beneath: while there is none, and for what it is not about.

        Raises:
            ApiError: the caller is no single user.

        """
        user, training = caller.user, self.training
        if user is None or training is None:
            told = (
                f"model: {PERSONAL!r} is whose key it is, and this key is no single user's: kilotune keys add --user "
                "makes one that is, and with --signs each request says it in X-Kilotune-User"
            )
            raise ApiError(400, told, param="model", code="no_user")
        namespace, adapters = namespace_of(caller), self.adapters
        try:
            key = await self.ask(namespace, lambda: adapters.resolve(namespace, model_of(user), LIVE), "model")
        except ApiError as error:
            if error.status != 404:
                raise
            on = (await self.rules(namespace)).model
            if on is None:
                return Meant(PERSONAL, None)
            try:
                shared = await self.ask(namespace, lambda: adapters.settle(namespace, on), "model")
            except ApiError as gone:
                raise hiding(caller, on, gone) from gone
            return await self._on(namespace, AdapterKey.shared(shared))
        if asked is None or (await self.rules(namespace)).scope == "all":
            return Meant(PERSONAL, key, await self._own(key))
        about = await self.ask(namespace, lambda: training.answers(key, user, asked), "model")
        return Meant(PERSONAL, key, await self._own(key)) if about else await self._on(namespace, key.on)

    async def _on(self, namespace: str, beneath: AdapterKey | None) -> Meant:
        """What a personal model stands on; None: the base."""
        if beneath is None:
            return Meant(PERSONAL, None)
        place, adapters = (beneath.namespace, beneath.name, beneath.version), self.adapters
        key = await self.ask(namespace, lambda: adapters.resolve(*place))
        return Meant(PERSONAL, key, await self._own(key))

    async def rules(self, namespace: str, fresh: bool = False) -> FeedbackRules:
        """A namespace's rules of feedback, which may be a second old, or those known last while the store is away.

        fresh: as they are now, whatever that takes.
        """
        if self.training is None:
            return FeedbackRules()
        until, known = self._rules.get(namespace, (0.0, None))
        now = time.monotonic()
        if known is not None and not fresh:
            if now < until:
                return known
            self._rules[namespace] = (now + AWAY, known)  # for those who come while the store is asked
        try:
            known = await self.ask(namespace, self.training.feedback(namespace).rules)
            until = time.monotonic() + RULES
        except ApiError:
            if fresh:
                raise
            known, until = known or FeedbackRules(), time.monotonic() + AWAY
        self._rules[namespace] = (until, known)
        self._rules.move_to_end(namespace)
        while len(self._rules) > RULED:
            self._rules.popitem(last=False)
        return known

    async def _own(self, key: AdapterKey) -> OwnTemplate | None:
        """An adapter's chat template, judged once for each version."""
        if key.own is None and key.on is None:
            return None
        if key in self._judged:
            self._judged.move_to_end(key)
            return self._judged[key]
        adapters, own = self.adapters, self.prompts.own
        found = await self.ask(key.namespace, lambda: own.judged(key.name, adapters.own_files(key)), "model")
        self._judged[key] = found
        while len(self._judged) > JUDGED:
            self._judged.popitem(last=False)
        return found

    async def templates(self, namespace: str, versions: Sequence[Version]) -> list[tuple[bool, bool]]:
        """Of each version: whether it has a chat template that chats are answered in, and whether that is its own.

        Raises:
            ApiError: the store does not answer.

        """
        base = (self.prompts.chats, False)
        found: dict[tuple[str | None, AdapterKey | None], tuple[bool, bool]] = {(None, None): base}
        told = []
        for version in versions:
            key = AdapterKey.of(namespace, version)
            what = (key.own, key.on)  # of many that bring the same one, one is looked at
            if what not in found:
                try:
                    own = await self._own(key)
                    found[what] = base if own is None else (own.refused is None, True)
                except ApiError as error:  # it cannot be asked, and those beside it are listed
                    if error.status >= 500:
                        raise
                    found[what] = (False, False)
            told.append(found[what])
        return told

    def split(self, model: str) -> tuple[str, Which]:
        """NAME, NAME/3 or NAME/alias as a name and a version; a name has no slash."""
        name, slash, word = model.partition("/")
        if not slash:
            return name, self.settings.version
        return name, int(word) if word.isdecimal() and word.isascii() and len(word) < 12 else word

    # -- what a request may have -----------------------------------------------------------------------

    def deadline(self, timeout: float | None) -> float:
        """Until when, of time.monotonic()."""
        return time.monotonic() + min(timeout or self.settings.max_seconds, self.settings.max_seconds)

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt has at most; what asks for an answer needs one token more."""
        return min(self.engine.max_length, self.settings.max_prompt or self.engine.max_length)

    def room(
        self, prompt: Sequence[int], wanted: int | None, usual: int | None, param: str, limit: str = "max_tokens"
    ) -> int:
        """How many new tokens an answer to this prompt may have.

        Args:
            prompt: its tokens.
            wanted: what the request says.
            usual: where it says nothing; None: as many as there is room for.
            param: what to name in an error.
            limit: what requests call ``wanted``.

        """
        longest = self.engine.max_length
        most = self.settings.max_prompt or longest
        told = f"this model takes {longest} tokens of prompt and answer together"
        if len(prompt) > most:
            told = told if most >= longest else f"this service takes prompts of {most} tokens"
            raise ApiError(400, f"{told}; the prompt has {len(prompt)}", param=param, code="context_length_exceeded")
        left = longest - len(prompt)
        if wanted is not None and wanted > self.settings.max_tokens:
            most = self.settings.max_tokens
            raise ApiError(400, f"{limit}: {wanted}; an answer has at most {most} here", param=limit)
        if left < (1 if wanted is None else wanted):
            more = "" if wanted is None else f" and {wanted} more are asked for"
            raise ApiError(
                400, f"{told}; the prompt has {len(prompt)}{more}", param=param, code="context_length_exceeded"
            )
        return min(left, self.settings.max_tokens, usual or left) if wanted is None else wanted

    def generation(
        self, request_id: str, caller: Key, meant: Meant, prompt: tuple[int, ...], sampling: Sampling, deadline: float
    ) -> Generation:
        """One answer to ask the engine for."""
        return Generation(
            id=request_id,
            tenant=namespace_of(caller),
            adapter=meant.adapter,
            prompt=prompt,
            sampling=sampling,
            deadline=deadline,
        )


def namespace_of(caller: Key) -> str:
    """Whose the requests with this key are."""
    assert caller.namespace is not None  # the keys of tenants have one
    return caller.namespace


def others(caller: Key, name: str) -> bool:
    """Whether a name is that of another user's own model, which is nothing to a caller who is a user."""
    if caller.user is None or not composed(name).startswith(f"{PERSONAL}:"):
        return False
    return composed(name) != model_of(caller.user)


def hiding(caller: Key, name: str, error: ApiError) -> ApiError:
    """An error of a name, without the nearest ones where those are of other users' models."""
    told = error.message.replace(repr(name), "")  # quoted: a part of another one's name is none of this one's
    if error.status != 404 or caller.user is None or f"{PERSONAL}:" not in told:
        return error
    return ApiError(404, f"there is no adapter {name!r}", param=error.param, code=error.code)


def seed_of(seed: int | None, choice: int) -> int | None:
    """The seed of one of several answers; the first has the request's own, as a number from 0."""
    if seed is None:
        return None
    if choice == 0 and seed >= 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()) >> 1
