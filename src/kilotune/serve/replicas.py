"""The service on several machines by Ray Serve: replicas that hold the base, and a front that knows their adapters.

::

    client -> front: reads the key and `model` of the body -> the replica where that adapter is resident
                                                            -> the whole service of ``serve.http``, in that process

A replica is the service of ``kilotune serve`` with no socket; limits, keys, errors and streams are its own. All of them
share one store, so an adapter that is put through any can be asked of all. Which replica has which adapter is Ray's
multiplexing: a replica that has answered for one says so, and Ray prefers it, unless it has its hands full.

Tested with Ray 2.60.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, final

from ..errors import ConfigError, MissingExtraError
from .http.http_errors import ApiError, body_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .http.service import Service

__all__ = ["application"]

KEPT = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")
NAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/classify")
WHICH = b"x-kilotune-replica"  # a header of each answer: which replica it is from
DRAIN = 30.0  # seconds that Ray gives a replica's answers when it takes the replica away


def application(
    build: Callable[[], Service],
    *,
    replicas: int = 2,
    resident: int = 1024,
    concurrency: int = 256,
    cpus: float = 1.0,
    gpus: float = 0.0,
    largest_body: int = 256 * 2**20,
    cors_origin: Sequence[str] = (),
) -> Any:
    """What ``ray.serve.run`` takes: ``replicas`` services behind one front.

    Args:
        build: makes a service with its engine started; called once in each replica. It must say the same in each:
            one base, one store that all of them reach (PostgreSQL, or one file system), one file of keys.
        replicas: how many services.
        resident: how many adapters a replica says it has: as many as its engine has slots.
        concurrency: requests that a replica holds at a time; beyond, Ray asks another one.
        cpus, gpus: what Ray sets aside for a replica.
        largest_body: bytes of a request that the front takes; the replica's own limits are applied after that.
        cors_origin: pages of these origins may ask from a browser, as ``--cors-origin`` says it; the front's own
            answers have the header then, and it answers what browsers ask beforehand.

    Returns:
        An application of Ray Serve.

    Raises:
        ConfigError: the numbers, or the origins. MissingExtraError: Ray is not installed.

    """
    for name, value in {"replicas": replicas, "resident": resident, "concurrency": concurrency}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: expected a whole number, at least 1, got {value!r}")
    origins = _origins(cors_origin)
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "serving by several replicas") from error

    @final
    class Replica(_Replica):
        @serve.multiplexed(max_num_models_per_replica=resident)  # type: ignore[untyped-decorator]
        async def note(self, adapter: str) -> str:
            """Ray is told that this replica has it now; the engine's bank has it by the time the answer begins."""
            return adapter

        async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
            if adapter := serve.get_multiplexed_model_id():
                await self.note(adapter)
            async for message in self.run(scope, body):
                if message["type"] == "http.response.start":
                    name = serve.get_replica_context().replica_id.unique_id.encode()
                    message = {**message, "headers": [*message["headers"], (WHICH, name)]}
                yield message

    made: Any = serve.deployment(
        Replica,
        name="kilotune-replica",
        num_replicas=replicas,
        max_ongoing_requests=concurrency,
        graceful_shutdown_timeout_s=DRAIN,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    entry = serve.ingress(lambda: _front(serve.get_deployment_handle("kilotune-replica"), largest_body, origins))()
    front: Any = serve.deployment(
        name="kilotune-front", max_ongoing_requests=4 * concurrency, ray_actor_options={"num_cpus": 0}
    )(entry)
    return front.bind(made.bind(build))


# -- a replica ---------------------------------------------------------------------------------------


class _Replica(ABC):
    """A service without a socket; what Ray decorates is added where Ray is imported."""

    def __init__(self, build: Callable[[], Service]) -> None:
        from .http.app import create_app

        self.service = build()
        self.app: ASGIApp = create_app(self.service)

    @abstractmethod
    def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """What the front calls: :meth:`run`, and Ray is told which adapter is here now."""

    def check_health(self) -> None:
        """Ray asks this, and starts another replica in place of one that raises."""
        if (why := self.service.engine.healthy()) is not None:
            raise RuntimeError(why)

    async def run(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The messages of one answer, as the application sends them; leaving it early is a client that went away."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=64)
        gone = asyncio.Event()
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            if (message := next(given, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def whole() -> None:
            try:
                await self.app(scope, receive, sent.put)
            finally:
                await sent.put(None)

        task = asyncio.create_task(whole())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def __del__(self) -> None:
        service = getattr(self, "service", None)  # build() may have failed
        if service is not None:
            service.engine.stop(0.0)
            service.close()


# -- the front ---------------------------------------------------------------------------------------


def _origins(given: Sequence[str]) -> tuple[str, ...]:
    """Origins, if they are some; whether there are keys is each replica's to see."""
    from .http.settings import ServeSettings

    return ServeSettings(keys="of each replica", cors_origin=tuple(given)).cors_origin


def _front(services: Any, largest_body: int, origins: Sequence[str]) -> ASGIApp:
    """The front, whose own answers are for pages of these origins, too."""
    from .http.app import cross_origin

    return cross_origin(_Front(services, largest_body), origins)


@final
class _Front:
    """An ASGI application that hands each request on, whole, and its answer back as it comes."""

    def __init__(self, services: Any, largest_body: int) -> None:
        self.services, self.largest_body = services, largest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            body = await self._body(receive)
        except ApiError as error:
            await _refuse(error, send)
            return
        if body is None:
            return
        handle = self.services.options(stream=True, multiplexed_model_id=adapter_of(scope, body))
        answer = handle.answer.remote({name: scope[name] for name in KEPT if name in scope}, body)
        watch = asyncio.create_task(_until_gone(receive, answer))
        begun = False
        try:
            async for message in answer:
                begun = True
                await send(message)
        except Exception as error:
            if begun:
                raise  # the client sees a stream that breaks off, which it must
            await _refuse(
                ApiError(503, f"no replica answered ({type(error).__name__}); try again", retry_after=1), send
            )
        finally:
            watch.cancel()

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or None where the client is gone."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.largest_body:
                raise ApiError(413, f"the body has more than {self.largest_body} bytes")
            if not message.get("more_body", False):
                return b"".join(parts)


def adapter_of(scope: Scope, body: bytes) -> str:
    """By what Ray tells adapters apart: a key and a name, or "" where a request names none.

    Nothing is checked here, for a wrong key or name gets the replica's own answer. It is a digest, since Ray shows it
    in its metrics and keys must not be seen there.
    """
    if scope["path"] not in NAMED:
        return ""
    try:
        name = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    if not isinstance(name, str):
        return ""
    key = next((value for header, value in scope["headers"] if header.lower() == b"authorization"), b"")
    return hashlib.sha256(key + b"\0" + name.split("/")[0].encode("utf-8", "surrogatepass")).hexdigest()[:32]


async def _until_gone(receive: Receive, answer: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


async def _refuse(error: ApiError, send: Send) -> None:
    body = body_of(error)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), str(value).encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
