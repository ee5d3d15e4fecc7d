"""The server's middleware (``--middleware kilotune.vllm.gate.Gate``): what vLLM's own way with adapters leaves open.

- Without the plugin in every worker nothing is answered but health and metrics.
- A name is looked up for each request, and the request goes on with the name of that version's content. So a roll-out
  holds for the next request (vLLM's server keeps what a name meant first), and no request mixes two versions.
- An adapter that cannot be served is an error with its reason. One that a worker could not load after all is an error
  too: the answer is held back until its first part, which never is the base's.
- Adapters come from the store alone: ``/v1/load_lora_adapter``, which takes any path on the server, is closed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, final

from ..errors import CheckpointError, ConfigError, KilotuneError, ResourceError, StoreError, UnsupportedError
from . import worker_status as run
from .adapter_source import Found, Source, shared

__all__ = ["Gate"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN: Final = ("/health", "/ping", "/metrics", "/version", "/load")
CLOSED: Final = ("/v1/load_lora_adapter",)
MAX_BODY: Final = 64 * 2**20
OUTCOMES: Final = ("adapter", "other", "refused", "unavailable", "lost")


@final
class Gate:
    """An ASGI application around vLLM's."""

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], source: Source | None = None) -> None:
        self._app, self._source = app, source or shared()
        self._count = _counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self._app(scope, receive, send)
        elif self._source.served() is None:
            message = "kilotune's plugin is not active in the workers of this engine, so nothing is served"
            await _refuse(send, 503, "service_unavailable_error", message)
        elif scope["path"] in CLOSED:
            await _refuse(send, 403, "permission_error", "adapters come from the store: name one as the model")
        elif scope["method"] != "POST":
            await self._app(scope, receive, send)
        else:
            await self._post(scope, receive, send)

    async def _post(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _whole(receive)
        if body is None:
            await _refuse(send, 413, "invalid_request_error", f"the request has more than {MAX_BODY} bytes")
            return
        values = _object(body)
        model = values.get("model")
        try:
            found = await self._found(model) if isinstance(model, str) else None
        except KilotuneError as error:
            outcome, status, kind = _kind(error)
            self._count(outcome)
            await _refuse(send, status, kind, str(error), model=model)
            return
        if found is None:
            self._count("other")
            await self._app(scope, _replay(body, receive), send)
            return
        body = json.dumps({**values, "model": found.name}).encode()
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        held = _Held(send, found, str(model), self._count)
        await self._app(scope, _replay(body, receive), held)
        await held.end()

    async def _found(self, model: str) -> Found | None:
        found = await asyncio.to_thread(self._source.find, model)
        if found is not None and run.lost(found.path):
            return await asyncio.to_thread(self._source.renew, model, found)
        return found


@final
class _Held:
    """Holds the head of an answer back until its first part is there, and then asks whether its adapter is."""

    def __init__(self, send: Send, found: Found, model: str, count: Callable[[str], None]) -> None:
        self._send, self._found, self._model, self._count = send, found, model, count
        self._head: Message | None = None
        self._state = "waiting"

    async def __call__(self, message: Message) -> None:
        if self._state == "lost":
            return
        if self._state == "waiting" and message["type"] == "http.response.start":
            self._head = message
            return
        if self._state == "waiting" and not message.get("body") and message.get("more_body"):
            return
        await self.end()
        if self._state == "passing":
            await self._send(message)

    async def end(self) -> None:
        """Let the head go, or an error in its place."""
        if self._state != "waiting" or self._head is None:
            return
        if run.lost(self._found.path):
            self._state = "lost"
            self._count("lost")
            message = "the adapter was lost on its way to the engine; ask again"
            await _refuse(self._send, 503, "service_unavailable_error", message, model=self._model)
            return
        self._state = "passing"
        self._count("adapter")
        await self._send(self._head)


def _kind(error: KilotuneError) -> tuple[str, int, str]:
    """(what it is counted as, the status, OpenAI's type)."""
    if isinstance(error, StoreError | ResourceError | ConfigError):
        return "unavailable", 503, "service_unavailable_error"
    if isinstance(error, CheckpointError | UnsupportedError):
        return "refused", 400, "invalid_request_error"
    return "refused", 404, "invalid_request_error"


async def _whole(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, status: int, kind: str, message: str, *, model: Any = None) -> None:
    param = None if model is None else "model"
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _counter() -> Callable[[str], None]:
    """Counts requests by what became of them: five series, however many tenants there are."""
    try:
        from prometheus_client import REGISTRY, Counter
    except ImportError:
        return lambda outcome: None
    name = "kilotune_vllm_requests"
    made: Any = getattr(REGISTRY, "_names_to_collectors", {}).get(name)
    if made is None:
        made = Counter(name, "Requests by what became of their model name.", ["outcome"])
        for outcome in OUTCOMES:
            made.labels(outcome)
    return lambda outcome: made.labels(outcome).inc()
