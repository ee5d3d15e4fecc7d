"""Rows of documents in a store's database, inside a transaction of the caller's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar, final

from ...errors import ConfigError
from .schema import Link

__all__ = ["COLUMNS", "PART", "Document", "Inside", "Transactions", "fill", "insert", "remove", "update"]

T = TypeVar("T")

COLUMNS = "id, namespace, kind, name, parent, state, created, owner, until, size, data"
PART = 1_000_000  # bytes of a body that are read or written at once


@final
@dataclass(frozen=True)
class Document:
    """One document. created: seconds since 1970. size: bytes of its body. number: the order in which they came."""

    kind: str
    name: str
    namespace: str
    data: Mapping[str, Any] = field(default_factory=dict)
    parent: str = ""
    state: str = ""
    owner: str | None = None
    until: float | None = None
    created: float = 0.0
    size: int = 0
    number: int = 0

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> Self:
        """Of the columns."""
        number, namespace, kind, name, parent, state, created, owner, until, size, data = row
        return cls(
            kind,
            name,
            namespace,
            json.loads(data),
            parent,
            state,
            owner,
            None if until is None else until / 1000,
            created / 1000,
            int(size),
            int(number),
        )


class Transactions(Protocol):
    """What makes a transaction of a piece of work; see :class:`SqlStore`."""

    def _read(self, work: Callable[[Link], T]) -> T: ...

    def _write(self, work: Callable[[Link], T]) -> T: ...

    def erase(self, work: Callable[[Link], T]) -> T:
        """As a write, and what it took away is off the disk."""
        ...


@final
class Inside:
    """Has everything done in a transaction that is open already. erases: whether something is to be off the disk."""

    def __init__(self, link: Link) -> None:
        self._link, self.erases = link, False

    def _read(self, work: Callable[[Link], T]) -> T:
        return work(self._link)

    def _write(self, work: Callable[[Link], T]) -> T:
        return work(self._link)

    def erase(self, work: Callable[[Link], T]) -> T:
        """See :class:`Transactions`; once the transaction has ended."""
        self.erases = True
        return work(self._link)


def insert(link: Link, made: Document, pieces: Sequence[bytes]) -> int:
    """Write a new document; its number."""
    names = "namespace, kind, name, parent, state, created, owner, until, size, data"
    row = link.one(
        f"INSERT INTO kilotune_documents ({names}) VALUES ({', '.join('?' * 10)}) RETURNING id",
        (made.namespace, made.kind, made.name, made.parent, made.state, int(made.created * 1000), *_told(made)),
    )
    assert row is not None
    fill(link, int(row[0]), pieces)
    return int(row[0])


def fill(link: Link, number: int, pieces: Sequence[bytes]) -> None:
    """Write a body."""
    body = b"".join(pieces)
    parts = (body[begin : begin + PART] for begin in range(0, len(body), PART))
    link.many(
        "INSERT INTO kilotune_bodies (document, part, data) VALUES (?, ?, ?)",
        ((number, part, piece) for part, piece in enumerate(parts)),
    )


def _told(made: Document) -> tuple[Any, ...]:
    until = None if made.until is None else int(made.until * 1000)
    return made.owner, until, made.size, _json(made.data)


def _json(data: Mapping[str, Any]) -> str:
    """Raises ConfigError: a text that a database does not take."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError("half of a surrogate pair, which is no character") from None
    return text


def update(link: Link, made: Document) -> None:
    """Write what of a document may change."""
    owner, until, _, data = _told(made)
    link.run(
        "UPDATE kilotune_documents SET state = ?, owner = ?, until = ?, data = ? WHERE id = ?",
        (made.state, owner, until, data, made.number),
    )


def remove(link: Link, found: Sequence[Document]) -> None:
    """These and all that belongs to them, however far down."""
    while found:
        link.many("DELETE FROM kilotune_documents WHERE id = ?", [(one.number,) for one in found])
        below = []
        for one in found:
            sql = f"SELECT {COLUMNS} FROM kilotune_documents WHERE parent = ? AND namespace = ?"
            below += [Document.of(row) for row in link.rows(sql, (one.name, one.namespace))]
        found = below
