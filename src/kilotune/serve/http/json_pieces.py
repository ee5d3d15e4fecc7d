"""Large answers, written in pieces: who has asked for much keeps nobody else waiting while it is written.

A call of ``json`` holds Python's lock to its end, in whatever thread it runs. So what is large is written in many calls
of a few values each, one piece in a turn of the loop, and of several large answers each in its turn. Their bytes are
those of one call.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["EVENT", "VALUES", "WHOLE", "JsonResponse", "Later", "Writing", "pieces_of"]

PIECE = 1 << 14  # characters after which others have their turn
VALUES = 512  # that one call of json writes at most, where no single one is more
CHARACTERS = 32  # of a text that count as one value more

WHOLE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # as Starlette's JSONResponse


@final
class Later:
    """A list in a document whose items are made when they are written, so that never all of them are there.

    Args:
        items: what they are made of.
        make: one of them.
        each: how many values one has, about; VALUES where it may have many, or such a list.

    """

    def __init__(self, items: Iterable[Any], make: Callable[[Any], Any], each: int = 1) -> None:
        self._items, self._make, self._at_once = items, make, max(1, VALUES // each)

    def all(self) -> list[Any]:
        """All items, at once."""
        return [*map(self._make, self._items)]

    def runs(self) -> Iterator[list[Any]]:
        """The items, as many at a time as one call may write."""
        made = map(self._make, self._items)
        while run := list(itertools.islice(made, self._at_once)):
            yield run


def _all_of(value: Any) -> list[Any]:
    if isinstance(value, Later):
        return value.all()
    raise TypeError(f"a {type(value).__name__} is no JSON")


EVENT = json.JSONEncoder(separators=(",", ":"), default=_all_of)  # of little, also in one call


def pieces_of(document: Any, encoder: json.JSONEncoder) -> Iterator[bytes]:
    """JSON of a document, as ``encoder`` writes it, in pieces that are small or hold one text each.

    document: of dictionaries with texts as names, lists, and what JSON has; lists may be :class:`Later`.
    """
    parts: list[str] = []
    size = 0
    for part in _parts(document, encoder):
        parts.append(part)
        size += len(part)
        if size >= PIECE:
            yield "".join(parts).encode()
            parts, size = [], 0
    if parts:
        yield "".join(parts).encode()


def _parts(value: Any, encoder: json.JSONEncoder) -> Iterator[str]:
    if isinstance(value, Later):
        yield from _of_runs(value.runs(), encoder)
    elif weight(value, VALUES) <= VALUES or isinstance(value, str):
        yield encoder.encode(value)
    elif isinstance(value, Mapping):
        before = "{"
        for name, inner in value.items():
            yield f"{before}{encoder.encode(name)}:"
            yield from _parts(inner, encoder)
            before = ","
        yield "}"
    else:
        yield from _of_runs(_runs(value), encoder)


def _of_runs(runs: Iterable[list[Any]], encoder: json.JSONEncoder) -> Iterator[str]:
    """A list of the items of all runs."""
    before = "["
    for run in runs:
        yield before
        before = ","
        if len(run) == 1:  # it may be large itself
            yield from _parts(run[0], encoder)
        else:
            yield encoder.encode(run)[1:-1]
    yield "[]" if before == "[" else "]"


def _runs(items: Sequence[Any]) -> Iterator[list[Any]]:
    """The items of a list, as many at a time as one call may write; a large one by itself."""
    run: list[Any] = []
    left = VALUES
    for item in items:
        heavy = weight(item, VALUES)
        if run and heavy > left:
            yield run
            run, left = [], VALUES
        run.append(item)
        left -= heavy
    if run:
        yield run


def weight(value: Any, most: int) -> int:
    """How many values there are in one, itself with them; what is above ``most`` is not counted to its end."""
    if isinstance(value, str):
        return 1 + len(value) // CHARACTERS
    if isinstance(value, Later):
        return most + 1
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    count = 1
    for one in inner:
        if count > most:
            break
        count += weight(one, most - count)
    return count


@final
class Writing:
    """The turns of those who write large answers: all of them together write a piece in a turn of the loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def all(self, pieces: Iterable[bytes]) -> list[bytes]:
        """All pieces, small ones joined, with others' turns between them; for what is small there is no waiting."""
        made: list[bytes] = []
        parts: list[bytes] = []
        size = 0
        for piece in pieces:
            parts.append(piece)
            size += len(piece)
            if size >= PIECE:
                made.append(b"".join(parts))
                parts, size = [], 0
                async with self._turn:
                    await asyncio.sleep(0)
        return [*made, b"".join(parts)] if size else made

    async def response(self, document: Any) -> Response:
        """An answer that is such a document."""
        return JsonResponse(await self.all(pieces_of(document, WHOLE)))


@final
class JsonResponse(Response):
    """A document whose bytes are there, sent piece by piece."""

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={**(headers or {}), "content-length": str(sum(map(len, pieces)))})
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in self._pieces[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": self._pieces[-1]})
