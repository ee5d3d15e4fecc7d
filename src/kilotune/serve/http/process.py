"""The process: its socket, its signals, and its end."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import final

import uvicorn

from ...errors import ConfigError
from .app import create_app
from .connections import Wire
from .logs import log
from .service import Service
from .settings import ServeSettings

__all__ = ["listen", "run"]

BACKLOG = 2048
KEEP_ALIVE = 65  # seconds; longer than the usual proxies keep theirs, so that none sends into a closing one
LAST = 5.0  # seconds for answers that were cut off to be told so


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that has its port before anything slow is begun, and takes connections only once :func:`run` is there.

    Until then a client, or a probe, is refused at once instead of waiting for a model that loads.

    Raises:
        ConfigError: the port is in use, or there is no such address.

    """
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"serve.host: {host!r} is no address here: {error.strerror or error}") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise _no_port(error, host, port) from error
    made.setblocking(False)
    return made


def _no_port(error: OSError, host: str, port: int) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use; take another with --port, or --port 0 for a free one")
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror}")


def url_of(listening: socket.socket) -> str:
    """Where the service is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@final
class _Server(uvicorn.Server):
    """uvicorn, which ends as this service does: it lets what runs go on for a while, and refuses what is new.

    Meanwhile it takes connections still, so that a balancer reads from ``/ready`` that it ends, and who asks is told to
    ask another one, where a closed port would be an error. With ``notice_seconds`` it takes what is new, too, so long
    as a balancer may not have read it. After that it does what uvicorn does. Tested with uvicorn 0.54.
    """

    service: Service
    drain_seconds: float
    notice_seconds: float
    tell: Callable[[], None]
    until: float | None = None
    """When what runs is cut off, of time.monotonic(); None: nobody told it to end."""
    _told = False
    _taking = 0.0  # until when what is new is taken, from then on

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.leaving = True
        if self.until is not None:  # asked again
            self.should_exit = self.force_exit = True
        else:
            self._taking = time.monotonic() + self.notice_seconds
            self.until = self._taking + self.drain_seconds
        self._drain()

    def _drain(self) -> bool:
        """Take nothing new, once the notice was given for long enough; whether it was."""
        if self.force_exit or time.monotonic() >= self._taking:
            self.service.draining = self.service.ending = True
        return self.service.ending

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self.until is None:
            return False
        if not self._told:
            self._told = True
            log("ending", answers=self.service.gate.count)
        return self._drain() and (not self.server_state.tasks or time.monotonic() >= self.until)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.tell()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = self.service.ending = True
        left = self.drain_seconds if self.until is None else max(0.0, self.until - time.monotonic())
        engine = asyncio.create_task(asyncio.to_thread(self.service.engine.stop, left))
        await super().shutdown(sockets)
        if not self.force_exit:
            await engine


def run(service: Service, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second one ends at once.

    Args:
        service: with an engine that has been started.
        listening: from :func:`listen`.
        ready: is told the URL once requests are taken.

    Raises:
        ConfigError: another process has taken the port meanwhile.

    """
    url = url_of(listening)
    config = uvicorn.Config(
        create_app(service),
        http=Wire,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=int(service.settings.drain_seconds + LAST),
        backlog=BACKLOG,
    )
    server = _Server(config)
    server.service, server.drain_seconds = service, service.settings.drain_seconds
    server.notice_seconds = service.settings.notice_seconds

    def tell() -> None:
        log("serving", url=url, base=service.base)
        ready(url)

    server.tell = tell
    try:
        try:
            listening.listen(BACKLOG)
        except OSError as error:  # another process bound it meanwhile, and was quicker
            raise _no_port(error, *listening.getsockname()[:2]) from error
        gc.collect()
        gc.freeze()  # what is loaded stays: to look through it for each body of many lists would hold up all answers
        server.run(sockets=[listening])
    finally:
        gc.unfreeze()
        service.close()
        listening.close()
    log("ended")
