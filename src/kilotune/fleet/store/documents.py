"""What a service keeps beside adapters, in the same database: uploaded files, jobs, their events, feedback.

A document is JSON with a few columns that are looked for, and a body of bytes where it has one::

    kind, name      what it is, and its id: made here, so that nobody can guess one (``file-...``, ``ftjob-...``)
    namespace       whose; nobody finds another one's
    parent          what it belongs to: an event's job, a rating's person. It goes when that goes
    state           of a job, or a word that it is looked for by: a rating's answer; a document changes in one
                    transaction, by a function of what it was
    owner, until    who works on it, and how long without a sign of life; from when on it may be taken; or until when it
                    is kept

All of it is on the disk before a call returns. The tables are made when they are first asked for; an earlier kilotune
passes them over.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, final

from ...errors import AdapterError, KilotuneError, StoreLimitError, UnsupportedError, type_name
from .adapter_store import AdapterStore
from .names import check_namespace
from .schema import Link
from .sql import SqlStore

__all__ = ["Document", "Documents", "QuotaError"]

TABLES = """
CREATE TABLE IF NOT EXISTS kilotune_documents (
    id {serial}, namespace {word} NOT NULL, kind {word} NOT NULL, name {word} NOT NULL, parent {word} NOT NULL,
    state {word} NOT NULL, created {number} NOT NULL, owner {word}, until {number}, size {number} NOT NULL,
    data {word} NOT NULL, UNIQUE (kind, name)
) {wide};

CREATE INDEX IF NOT EXISTS kilotune_documents_lists ON kilotune_documents (namespace, kind, parent, id);

CREATE INDEX IF NOT EXISTS kilotune_documents_parent ON kilotune_documents (parent);

CREATE INDEX IF NOT EXISTS kilotune_documents_work ON kilotune_documents (kind, state, id);

CREATE INDEX IF NOT EXISTS kilotune_documents_until ON kilotune_documents (until);

CREATE TABLE IF NOT EXISTS kilotune_bodies (
    document {number} NOT NULL REFERENCES kilotune_documents (id) ON DELETE CASCADE, part {number} NOT NULL,
    data {blob} NOT NULL, PRIMARY KEY (document, part)
) {narrow}
"""
COLUMNS = "id, namespace, kind, name, parent, state, created, owner, until, size, data"
PART = 1_000_000  # bytes of a body that are read or written at once


@final
class QuotaError(KilotuneError):
    """A namespace has all that it may have."""


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


Change = Callable[[Document], Document]


@final
class Documents:
    """The documents of a store, of one namespace or, where it is None, of all.

    Args:
        store: in a database.
        namespace: whose documents are seen.
        clock: seconds since 1970.

    Raises:
        UnsupportedError: the store is folders, which keep adapters alone. StoreLimitError: it is only read.

    """

    def __init__(
        self, store: AdapterStore, namespace: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        if not isinstance(store, SqlStore):
            raise UnsupportedError(
                f"documents: a {type_name(store)} keeps adapters alone; files, jobs and feedback need a store in "
                "SQLite (sqlite:///adapters.db) or PostgreSQL"
            )
        if store.read_only:
            raise StoreLimitError(f"documents: {store.url} is opened to be read alone")
        self._store, self._clock = store, clock
        self.namespace = None if namespace is None else check_namespace(namespace)
        store.make_tables(part.strip() for part in TABLES.split(";"))

    def within(self, namespace: str) -> Documents:
        """Those of one namespace."""
        made: Documents = object.__new__(Documents)
        made._store, made._clock, made.namespace = self._store, self._clock, check_namespace(namespace)
        return made

    # -- one -------------------------------------------------------------------------------------

    def add(
        self,
        kind: str,
        data: Mapping[str, Any],
        *,
        parent: str = "",
        state: str = "",
        until: float | None = None,
        body: Iterable[bytes] | None = None,
        prefix: str | None = None,
        quota: int | None = None,
    ) -> Document:
        """A new document, with a name that nobody can guess.

        Args:
            kind: what it is.
            data: JSON.
            parent: the name of what it belongs to, which must be there, in this namespace.
            state: where it begins.
            until: seconds since 1970; when it may go.
            body: bytes, in pieces.
            prefix: of the name; by default the kind.
            quota: how many bytes bodies of this kind may take in this namespace in all.

        Raises:
            AdapterError: there is no such parent. QuotaError: it would be more than that.

        """
        made, pieces = self._new(kind, data, parent, state, until, body, prefix)
        return self._store._write(lambda link: self._put(link, made, pieces, quota))

    def swap(
        self,
        kind: str,
        data: Mapping[str, Any],
        *,
        parent: str = "",
        state: str = "",
        body: Iterable[bytes] | None = None,
        prefix: str | None = None,
        quota: int | None = None,
    ) -> tuple[Document, bool]:
        """As :meth:`add`, in place of what there is of this kind, parent and state, which goes off the disk.

        Returns:
            (it, whether there was something).

        """
        made, pieces = self._new(kind, data, parent, state, None, body, prefix)

        def work(link: Link) -> tuple[Document, bool]:
            found = self._alike(link, made)
            _remove(link, found)
            return self._put(link, made, pieces, quota), bool(found)

        return self._store.erase(work)

    def find(self, kind: str, name: str) -> Document | None:
        """A document; None where there is none of this namespace."""
        row = self._store._read(lambda link: link.one(*self._one(kind, name)))
        return None if row is None else Document.of(row)

    def body(self, kind: str, name: str) -> Iterator[bytes]:
        """The bytes of a document, in pieces; nothing where it has none, or is not there."""
        own, values = self._own("d.")
        sql = (
            "SELECT b.data FROM kilotune_documents d JOIN kilotune_bodies b ON b.document = d.id "
            f"WHERE d.kind = ? AND d.name = ?{own} AND b.part = ?"
        )
        part = 0
        while True:
            row = self._store._read(lambda link, at=part: link.one(sql, (kind, name, *values, at)))  # type: ignore[misc]
            if row is None:
                return
            yield bytes(row[0])
            part += 1

    def change(self, kind: str, name: str, change: Change, erased: bool = False) -> Document | None:
        """Make of a document what ``change`` makes of it, and nobody else comes in between.

        Args:
            kind, name: of the document.
            change: it, and what it is to be.
            erased: whether what it was before is to be off the disk (see ``erase``).

        Returns:
            It as it is now; None where there is none. ``change`` may raise: then nothing has changed.

        """

        def work(link: Link) -> Document | None:
            sql, values = self._one(kind, name)
            row = link.one(sql + link.locking, values)
            if row is None:
                return None
            found = Document.of(row)
            made = change(found)
            if made is not found:
                _update(link, made)
            return made

        return (self._store.erase if erased else self._store._write)(work)

    def put(self, kind: str, name: str, make: Callable[[Document | None], Document]) -> Document:
        """Make of the document of this name what ``make`` makes of it; of None, where there is none, a new one.

        Nobody else comes in between. The name is the caller's: no other namespace may come to the same one.
        ``make`` may raise: then nothing has changed.
        """
        assert self.namespace is not None, "a new document belongs to a namespace"
        namespace = self.namespace

        def work(link: Link) -> Document:
            link.hold(f"{namespace} {kind} {name}")  # of two who would make it, one finds the other's
            sql, values = self._one(kind, name)
            row = link.one(sql + link.locking, values)
            found = None if row is None else Document.of(row)
            made = replace(make(found), kind=kind, name=name, namespace=namespace)
            if found is None:
                made = replace(made, created=self._clock())
                return replace(made, number=_insert(link, made, []))
            made = replace(made, number=found.number, created=found.created)
            _update(link, made)
            return made

        return self._store._write(work)

    def refill(self, kind: str, name: str, body: Iterable[bytes]) -> bool:
        """Give a document other bytes; those before are off the disk (see ``erase``). Whether there was one."""
        pieces = [piece for piece in body if piece]

        def work(link: Link) -> bool:
            sql, values = self._one(kind, name)
            row = link.one(sql + link.locking, values)
            if row is not None:
                found = Document.of(row)
                link.run("DELETE FROM kilotune_bodies WHERE document = ?", (found.number,))
                _fill(link, found.number, pieces)
                size = sum(map(len, pieces))
                link.run("UPDATE kilotune_documents SET size = ? WHERE id = ?", (size, found.number))
            return row is not None

        return self._store.erase(work)

    def rm(self, kind: str, name: str) -> bool:
        """Remove a document and all that belongs to it, off the disk (see ``erase``); whether there was one."""

        def work(link: Link) -> bool:
            sql, values = self._one(kind, name)
            row = link.one(sql, values)
            if row is not None:
                _remove(link, [Document.of(row)])
            return row is not None

        return self._store.erase(work)

    # -- many ------------------------------------------------------------------------------------

    def ls(
        self,
        kind: str,
        *,
        parent: str | None = None,
        state: str | None = None,
        after: str | None = None,
        newest: bool = False,
        limit: int = 100,
    ) -> list[Document]:
        """Documents in the order in which they came.

        Args:
            kind: what.
            parent: of what.
            state: in which.
            after: a name; those that come after it.
            newest: the newest first.
            limit: at most so many.

        """
        own, values = self._own()
        sql = f"SELECT {COLUMNS} FROM kilotune_documents WHERE kind = ?{own}"
        given: list[Any] = [kind, *values]
        for column, value in (("parent", parent), ("state", state)):
            if value is not None:
                sql += f" AND {column} = ?"
                given.append(value)
        if after is not None:
            sql += f" AND id {'<' if newest else '>'} (SELECT id FROM kilotune_documents WHERE kind = ? AND name = ?)"
            given += [kind, after]
        sql += f" ORDER BY id {'DESC' if newest else 'ASC'} LIMIT ?"
        rows = self._store._read(lambda link: link.rows(sql, [*given, limit]))
        return [Document.of(row) for row in rows]

    def total(self, kind: str, *, states: Iterable[str] | None = None) -> tuple[int, int]:
        """(how many, bytes of their bodies)."""
        own, values = self._own()
        named = None if states is None else list(states)
        only = "" if named is None else f" AND state IN ({', '.join('?' for _ in named)})"
        sql = f"SELECT COUNT(*), COALESCE(SUM(size), 0) FROM kilotune_documents WHERE kind = ?{own}{only}"
        row = self._store._read(lambda link: link.one(sql, (kind, *values, *(named or ()))))
        assert row is not None
        return int(row[0]), int(row[1])

    # -- work ------------------------------------------------------------------------------------

    def claim(self, kind: str, owner: str, seconds: float, states: tuple[str, str] = ("queued", "running")) -> Any:
        """Take the oldest document that waits, or whose owner has given no sign of life; None where there is none.

        Args:
            kind: what.
            owner: who takes it, for ``seconds`` without :meth:`renew`.
            seconds: see there.
            states: what waits (if it has an ``until``, from then on), and what it is from now on.

        """
        own, values = self._own()
        sql = (
            f"SELECT {COLUMNS} FROM kilotune_documents WHERE kind = ?{own} "
            "AND ((state = ? AND (until IS NULL OR until <= ?)) OR (state = ? AND until < ?)) ORDER BY id LIMIT 1"
        )

        def work(link: Link) -> Document | None:
            now = self._clock()
            at = int(now * 1000)
            passing = f"{link.locking} SKIP LOCKED" if link.locking else ""  # what another one is just taking
            row = link.one(sql + passing, (kind, *values, states[0], at, states[1], at))
            if row is None:
                return None
            made = replace(Document.of(row), state=states[1], owner=owner, until=now + seconds)
            _update(link, made)
            return made

        return self._store._write(work)

    def renew(self, kind: str, name: str, owner: str, seconds: float) -> bool:
        """A sign of life: the document stays ``owner``'s; False where it is somebody else's, or gone."""
        until = int((self._clock() + seconds) * 1000)
        sql = "UPDATE kilotune_documents SET until = ? WHERE kind = ? AND name = ? AND owner = ?"
        return self._store._write(lambda link: link.run(sql, (until, kind, name, owner))) > 0

    def expire(self, kind: str, limit: int = 1000) -> int:
        """Remove those whose time is over; how many."""
        own, values = self._own()
        sql = f"SELECT {COLUMNS} FROM kilotune_documents WHERE until < ? AND kind = ?{own} ORDER BY until LIMIT ?"

        def over(link: Link) -> list[Document]:
            return [Document.of(row) for row in link.rows(sql, (int(self._clock() * 1000), kind, *values, limit))]

        def work(link: Link) -> int:
            found = over(link)
            _remove(link, found)
            return len(found)

        return self._store.erase(work) if self._store._read(over) else 0

    def shrink(self, kind: str, size: int) -> int:
        """Remove the oldest of a kind until the bodies of those left have at most so many bytes; how many went."""
        own, values = self._own()
        sql = (
            f"SELECT {COLUMNS} FROM (SELECT {COLUMNS}, SUM(size) OVER (ORDER BY id DESC) AS upto "
            f"FROM kilotune_documents WHERE kind = ?{own}) AS listed WHERE upto > ?"
        )

        def work(link: Link) -> int:
            found = [Document.of(row) for row in link.rows(sql, (kind, *values, size))]
            _remove(link, found)
            return len(found)

        return self._store.erase(work)

    # -- inside ----------------------------------------------------------------------------------

    def _new(
        self,
        kind: str,
        data: Mapping[str, Any],
        parent: str,
        state: str,
        until: float | None,
        body: Iterable[bytes] | None,
        prefix: str | None,
    ) -> tuple[Document, list[bytes]]:
        assert self.namespace is not None, "a new document belongs to a namespace"
        pieces = [piece for piece in (body or ()) if piece]
        name, now = f"{prefix or kind}-{secrets.token_urlsafe(18)}", self._clock()
        size = sum(map(len, pieces))
        return Document(kind, name, self.namespace, dict(data), parent, state, None, until, now, size), pieces

    def _put(self, link: Link, made: Document, pieces: list[bytes], quota: int | None) -> Document:
        if made.parent:
            sql = f"SELECT id FROM kilotune_documents WHERE name = ? AND namespace = ?{link.sharing}"
            if link.one(sql, (made.parent, self.namespace)) is None:
                raise AdapterError(f"there is no {made.parent!r}")
        self._check_quota(link, made.kind, made.size, quota)
        return replace(made, number=_insert(link, made, pieces))

    def _alike(self, link: Link, made: Document) -> list[Document]:
        """Those of the same kind, parent and state, which nobody adds to until the transaction ends."""
        link.hold(f"{made.namespace} {made.kind} {made.parent} {made.state}")
        own, values = self._own()
        sql = f"SELECT {COLUMNS} FROM kilotune_documents WHERE kind = ? AND parent = ? AND state = ?{own} ORDER BY id"
        return [Document.of(row) for row in link.rows(sql, (made.kind, made.parent, made.state, *values))]

    def _own(self, table: str = "") -> tuple[str, tuple[str, ...]]:
        return ("", ()) if self.namespace is None else (f" AND {table}namespace = ?", (self.namespace,))

    def _one(self, kind: str, name: str) -> tuple[str, tuple[str, ...]]:
        own, values = self._own()
        return f"SELECT {COLUMNS} FROM kilotune_documents WHERE kind = ? AND name = ?{own}", (kind, name, *values)

    def _check_quota(self, link: Link, kind: str, size: int, quota: int | None) -> None:
        if quota is None:
            return
        link.hold(f"{self.namespace} {kind}")  # two at once are counted one after the other
        sql = "SELECT COALESCE(SUM(size), 0) FROM kilotune_documents WHERE kind = ? AND namespace = ?"
        row = link.one(sql, (kind, self.namespace))
        there = 0 if row is None else int(row[0])
        if there + size > quota:
            raise QuotaError(f"{kind}: {size} bytes beside the {there} there are more than the {quota} allowed")


def _insert(link: Link, made: Document, pieces: list[bytes]) -> int:
    names = "namespace, kind, name, parent, state, created, owner, until, size, data"
    row = link.one(
        f"INSERT INTO kilotune_documents ({names}) VALUES ({', '.join('?' * 10)}) RETURNING id",
        (made.namespace, made.kind, made.name, made.parent, made.state, int(made.created * 1000), *_told(made)),
    )
    assert row is not None
    _fill(link, int(row[0]), pieces)
    return int(row[0])


def _fill(link: Link, number: int, pieces: list[bytes]) -> None:
    body = b"".join(pieces)
    parts = (body[begin : begin + PART] for begin in range(0, len(body), PART))
    link.many(
        "INSERT INTO kilotune_bodies (document, part, data) VALUES (?, ?, ?)",
        ((number, part, piece) for part, piece in enumerate(parts)),
    )


def _told(made: Document) -> tuple[Any, ...]:
    until = None if made.until is None else int(made.until * 1000)
    return made.owner, until, made.size, json.dumps(made.data, ensure_ascii=False, separators=(",", ":"))


def _update(link: Link, made: Document) -> None:
    owner, until, _, data = _told(made)
    link.run(
        "UPDATE kilotune_documents SET state = ?, owner = ?, until = ?, data = ? WHERE id = ?",
        (made.state, owner, until, data, made.number),
    )


def _remove(link: Link, found: list[Document]) -> None:
    """These and all that belongs to them, however far down."""
    while found:
        link.many("DELETE FROM kilotune_documents WHERE id = ?", [(one.number,) for one in found])
        below = []
        for one in found:
            sql = f"SELECT {COLUMNS} FROM kilotune_documents WHERE parent = ? AND namespace = ?"
            below += [Document.of(row) for row in link.rows(sql, (one.name, one.namespace))]
        found = below
