"""What a client sends before its request is known: bounded, and refused in OpenAI's shape where it is no HTTP.

And when it is gone: the request that it waits for is told at once, whatever else the client has sent or not taken.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .http_errors import ApiError, body_of

__all__ = ["MAX_HEAD", "Wire"]

MAX_HEAD = 64 * 1024  # bytes of a request's line and headers


@final
class Wire(HttpToolsProtocol):
    """uvicorn's protocol for one connection, made to bound headers and to notice each client that goes away.

    By itself it keeps headers without end, of whoever sends them. Behind a second request that comes before the first
    one is answered it reads no more, and so does not see that the client is gone; and it tells that to the second one
    alone. Here such a request is not read: the connection ends with the first one's answer, and a client that sends
    ahead asks again, as HTTP has it (RFC 9112, 9.3.2).
    """

    _moved = False  # whether the piece at hand began or ended a message or its headers, or brought a part of a body
    _since = 0  # bytes of pieces that did none of it: of headers, of what follows a body, or between requests
    _ahead = False  # whether the client has begun another request too early; nothing of it is kept

    def data_received(self, data: bytes) -> None:
        if self._ahead:
            return
        self._moved = False
        super().data_received(data)
        self._since = 0 if self._moved else self._since + len(data)
        if self._since > MAX_HEAD and not self.transport.is_closing():
            told = f"the request's line and headers are larger than {MAX_HEAD} bytes"
            self._refuse(ApiError(431, told, code="headers_too_large"))

    def on_message_begin(self) -> None:
        self._moved = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._moved = True
        if self._answering:
            self._ahead, self.cycle.keep_alive = True, False
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        if not self._ahead:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._moved = True
        if not self._ahead:
            super().on_message_complete()

    def eof_received(self) -> None:
        """A client that sends no more is gone, also where it has yet to take what was written to it."""
        if self._answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        if not self._ahead:
            self._refuse(ApiError(400, "what was sent is no HTTP/1.1 request that can be read", code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        body = body_of(error)
        lines = [
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()
