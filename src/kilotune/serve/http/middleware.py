"""Before the routes: who asks, how much of a body is taken, when a client is gone, and what is noted of all this."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import claims, tracing
from .answers import Asked
from .http_errors import ApiError, body_of
from .keys import MANAGER, MONITOR, TENANT, Key
from .logs import log
from .service import Service
from .settings import is_local

__all__ = ["Front", "Noted", "internal", "noted"]

LOADS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
OPEN = frozenset({"/", "/health", "/ready", "/openapi.json"})
MANAGE = "/manage"
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
GONE = 499  # what the log says of a client that went away
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]


@final
@dataclass
class Noted:
    """What is known of a request when it ends; routes write into it.

    fields: more for the log. held: what the request holds, let go of when it ends, however that is. place: its place
    among the puts; who has one gives it back before the answer, or the client's next put may find it taken. labels:
    its adapter's in the metrics. asked: its answers, once the engine is asked for them.
    """

    id: str
    started: float
    caller: Key | None = None
    status: int = 0
    route: str = "unmatched"
    fields: dict[str, Any] = field(default_factory=dict)
    held: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    place: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    labels: tuple[str, str] | None = None
    asked: Sequence[Asked] = ()


def noted(scope: Scope) -> Noted:
    """What is noted of the request."""
    found: Noted = scope["state"]["noted"]
    return found


@final
class Front:
    """The outermost application. A client that goes away cancels its request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        given = _header(scope, b"x-request-id")
        note = Noted(given if given and REQUEST_ID.fullmatch(given) else uuid.uuid4().hex, time.monotonic())
        scope.setdefault("state", {})["noted"] = note
        exchange = _Exchange(self.service, note, receive, send)
        span = None
        if self.service.tracer is not None:
            names = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
            span = tracing.begin(self.service.tracer, scope["method"], scope["path"], names)
        try:
            await self._run(scope, exchange)
        finally:
            self._tell(scope, note)
            if span is not None:
                namespace = None if note.caller is None else note.caller.namespace
                told = {"request_id": note.id, "namespace": namespace, **note.fields}
                tracing.end(span, scope["method"], note.route, note.status, told)

    async def _run(self, scope: Scope, exchange: _Exchange) -> None:
        note = exchange.note
        try:
            note.caller = self._let_in(scope)
            exchange.limit = self._limit(scope)
            with note.place:
                self._give_place(scope, note)
                await exchange.run(self.app, scope)
        except ApiError as error:
            await exchange.refuse(error)
        except Exception as error:
            log("failed", level=40, failed=error, request_id=note.id, path=scope["path"])
            await exchange.refuse(internal(note.id))

    # -- who asks ------------------------------------------------------------------------------------

    def _let_in(self, scope: Scope) -> Key | None:
        path = scope["path"]
        if self.service.keys.open_to is not None:
            self._check_host(scope)
        if path in OPEN or path.startswith("/page/"):
            return None
        caller = self.service.keys.find(_bearer(scope))
        if caller is None:
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
        roles = _roles(path)
        if caller.role not in roles:
            raise ApiError(403, f"this key is a {caller.role}'s; {path} needs that of a {' or '.join(roles)}")
        changes = MANAGER in roles and scope["method"] not in ("GET", "HEAD")
        if (self.service.draining and TENANT in roles) or (self.service.ending and changes):
            raise ApiError(
                503, "the service is about to end; ask another one", retry_after=5, headers={"Connection": "close"}
            )
        claim = _header(scope, claims.HEADER)
        return caller if claim is None else claims.claimed(caller, claim)

    def _check_host(self, scope: Scope) -> None:
        """Without keys nothing must come in through a name that a web page made to point here."""
        host = (_header(scope, b"host") or "").rsplit("@", 1)[-1]
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if not is_local(name) and name != self.service.settings.host:
            raise ApiError(403, f"this service is for this machine only, and knows no host {name!r}")

    def _give_place(self, scope: Scope, note: Noted) -> None:
        """A place for a put, before its files are taken in; of the namespace that the key is of, else of the path's."""
        if _is_put(scope) and note.caller is not None:
            namespace = note.caller.namespace or scope["path"].split("/")[2]
            note.place.enter_context(self.service.puts.enter(namespace, 1))

    # -- bodies --------------------------------------------------------------------------------------

    def _limit(self, scope: Scope) -> int:
        limit = self.service.settings.max_body
        if _is_put(scope):
            limit = self.service.settings.max_adapter + 65536  # what is around the files
        elif scope["path"] == "/v1/files":
            limit = self.service.settings.max_file + 65536
        coding = _header(scope, b"content-encoding")
        if coding is not None and coding.strip().lower() not in ("", "identity"):
            raise ApiError(415, f"content-encoding: {coding!r:.100} is not taken; send the body as it is")
        length = _header(scope, b"content-length")
        if length is not None and length.isdecimal() and int(length) > limit:
            raise too_large(limit)
        return limit

    def _tell(self, scope: Scope, note: Noted) -> None:
        seconds = time.monotonic() - note.started
        note.route = getattr(scope.get("route"), "path", note.route)
        namespace = None if note.caller is None else note.caller.namespace
        metrics = self.service.metrics
        metrics.requests.labels(note.route, str(note.status), metrics.label(namespace)).inc()
        metrics.seconds.labels(note.route).observe(seconds)
        if note.labels is not None:
            metrics.by_adapter.requests.labels(*note.labels, str(note.status)).inc()
        slow = self.service.settings.slow_request
        if slow is not None and seconds >= slow:
            log("slow request", level=logging.WARNING, **_slow(note, namespace, seconds))
        log(
            "request",
            request_id=note.id,
            method=scope["method"],
            path=scope["path"],
            status=note.status,
            namespace=namespace,
            key=None if note.caller is None else note.caller.id or None,
            ms=round(1000 * seconds, 1),
            **note.fields,
        )


@final
class _Exchange:
    """One request and its answer on the wire."""

    def __init__(self, service: Service, note: Noted, receive: Receive, send: Send) -> None:
        self.note, self._receive, self._send = note, receive, send
        self._settings = service.settings
        self.limit, self._size = service.settings.max_body, 0
        self._until = asyncio.get_running_loop().time() + service.settings.body_seconds
        self._gone = asyncio.Event()
        self._started = self._finished = False
        self._task: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application until it has answered or the client is gone."""
        self._task = asyncio.create_task(self._call(app, scope))
        try:
            await self._task
        except asyncio.CancelledError:
            if not self._gone.is_set():  # the server is ending
                self._task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._task
                raise
            self.note.status = GONE
        finally:
            if self._watcher is not None:
                self._watcher.cancel()

    async def _call(self, app: ASGIApp, scope: Scope) -> None:
        async with self.note.held:
            await app(scope, self.receive, self.send)

    async def receive(self) -> Message:
        """The next part of the body; once it is all here, the client is watched."""
        if self._watcher is not None:
            await self._gone.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            seconds = self._settings.body_seconds
            raise HTTPException(408, f"the body did not arrive within {seconds:g} s", {"Connection": "close"}) from None
        if message["type"] == "http.disconnect":  # before all of the body was here
            self._leave()
            await asyncio.sleep(0)  # where the cancelling arrives
            return message
        self._size += len(message.get("body", b""))
        if self._size > self.limit:
            error = too_large(self.limit)
            raise HTTPException(error.status, error.message, error.headers)
        if not message.get("more_body", False):
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if not self._finished:
            self._gone.set()
            assert self._task is not None
            self._task.cancel()

    async def send(self, message: Message) -> None:
        """Pass a part of the answer on; a client that does not take it is dropped."""
        if message["type"] == "http.response.start":
            self._started, self.note.status = True, message["status"]
            own = [(b"x-request-id", self.note.id.encode()), *HEADERS]
            named = {name.lower() for name, _ in message.get("headers", ())}
            more = [pair for pair in own if pair[0] not in named]
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
        try:
            async with asyncio.timeout(self._settings.write_seconds):
                await self._send(message)
        except TimeoutError:
            self._finished = False
            self.note.fields["dropped"] = "the client took nothing of its answer"
            self._leave()
            await asyncio.sleep(0)  # where the cancelling arrives

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error, where nothing has been answered yet."""
        self.note.fields["error"] = error.code
        if self._started:
            return
        body = body_of(error)
        headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def _slow(note: Noted, namespace: str | None, seconds: float) -> dict[str, Any]:
    """What the log says of a request that took long: whose it was, what it was of, and where the time went.

    Of several answers, the longest waits; null: it did not come to that.
    """
    asked, told = note.asked, note.fields

    def longest(values: Iterable[float | None]) -> float | None:
        return max((round(1000 * value, 1) for value in values if value is not None), default=None)

    return {
        "request_id": note.id,
        "route": note.route,
        "status": note.status,
        "namespace": namespace,
        "adapter": told.get("model"),
        "prompt_tokens": told.get("prompt_tokens", sum(one.prompt for one in asked) if asked else None),
        "completion_tokens": sum(one.made for one in asked) if asked else None,
        "queue_ms": longest(one.queued for one in asked),
        "first_token_ms": longest(one.first for one in asked),
        "whole_ms": round(1000 * seconds, 1),
    }


def internal(request_id: str) -> ApiError:
    """The error of a defect, which tells nothing of it."""
    return ApiError(500, f"an internal error; the log has it as request {request_id}")


def too_large(limit: int) -> ApiError:
    """The error of a body that is larger than ``limit``."""
    return ApiError(413, f"the body is larger than {limit} bytes", headers={"Connection": "close"})


def _is_put(scope: Scope) -> bool:
    """Of an adapter."""
    parts = scope["path"].split("/")
    return scope["method"] == "PUT" and f"/{parts[1]}" == MANAGE and parts[3:4] == ["adapters"]


def _roles(path: str) -> tuple[str, ...]:
    if path == MANAGE or path.startswith(f"{MANAGE}/") or path in LOADS:
        return (MANAGER,)
    return (MANAGER, MONITOR) if path == "/metrics" else (TENANT,)


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _bearer(scope: Scope) -> str | None:
    given = _header(scope, b"authorization")
    if given is None:
        return None
    scheme, _, key = given.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
