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

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar, final

from ...errors import AdapterError, KilotuneError, StoreLimitError, UnsupportedError, type_name
from .adapter_store import AdapterStore
from .document_rows import COLUMNS, PART, Document, Inside, Transactions, fill, insert, remove, update
from .names import check_namespace
from .schema import Link
from .sql import SqlStore

__all__ = ["Document", "Documents", "QuotaError"]

T = TypeVar("T")

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


@final
class QuotaError(KilotuneError):
    """A namespace has all that it may have."""


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
        self._store: Transactions = store
        self._clock = clock
        self.namespace = None if namespace is None else check_namespace(namespace)
        store.make_tables(part.strip() for part in TABLES.split(";"))

    def within(self, namespace: str) -> Documents:
        """Those of one namespace."""
        return self._copy(self._store, check_namespace(namespace))

    def together(self, work: Callable[[Documents], T]) -> T:
        """Do several things in one transaction: all of them or, where ``work`` raises, none; on the disk once.

        Args:
            work: is given these documents, to do them with; a database that met others has it run again, so it changes
                nothing else.

        """

        def inside(link: Link) -> tuple[T, bool]:
            own = Inside(link)
            return work(self._copy(own, self.namespace)), own.erases

        found, erases = self._store._write(inside)
        if erases:
            self.wipe()
        return found

    def _copy(self, store: Transactions, namespace: str | None) -> Documents:
        made: Documents = object.__new__(Documents)
        made._store, made._clock, made.namespace = store, self._clock, namespace
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
            remove(link, found)
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
        part, name = 0, _plain(name)
        while True:
            row = self._store._read(lambda link, at=part: link.one(sql, (kind, name, *values, at)))  # type: ignore[misc]
            if row is None:
                return
            yield bytes(row[0])
            part += 1
            if len(row[0]) < PART:  # all but the last are as large
                return

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
                update(link, made)
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
                return replace(made, number=insert(link, made, []))
            made = replace(made, number=found.number, created=found.created)
            update(link, made)
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
                fill(link, found.number, pieces)
                size = sum(map(len, pieces))
                link.run("UPDATE kilotune_documents SET size = ? WHERE id = ?", (size, found.number))
            return row is not None

        return self._store.erase(work)

    def rm(self, kind: str, name: str, erased: bool = True) -> bool:
        """Remove a document and all that belongs to it; whether there was one.

        erased: whether it is to be off the disk at once (see ``erase``), as what somebody takes back is.
        """

        def work(link: Link) -> bool:
            sql, values = self._one(kind, name)
            row = link.one(sql, values)
            if row is not None:
                remove(link, [Document.of(row)])
            return row is not None

        return (self._store.erase if erased else self._store._write)(work)

    def wipe(self) -> None:
        """See that what was removed from the store by others is off the disk (see ``erase``)."""
        self._store.erase(lambda link: None)

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
            given += [kind, _plain(after)]
        sql += f" ORDER BY id {'DESC' if newest else 'ASC'} LIMIT ?"
        rows = self._store._read(lambda link: link.rows(sql, [*given, limit]))
        return [Document.of(row) for row in rows]

    def total(self, kind: str, *, states: Iterable[str] | None = None, parent: str | None = None) -> tuple[int, int]:
        """(how many, bytes of their bodies). parent: of what belongs to that alone."""
        own, values = self._own()
        named = None if states is None else list(states)
        only = "" if named is None else f" AND state IN ({', '.join('?' for _ in named)})"
        below, of = _below(parent)
        sql = f"SELECT COUNT(*), COALESCE(SUM(size), 0) FROM kilotune_documents WHERE kind = ?{own}{only}{below}"
        row = self._store._read(lambda link: link.one(sql, (kind, *values, *(named or ()), *of)))
        assert row is not None
        return int(row[0]), int(row[1])

    # -- work ------------------------------------------------------------------------------------

    def claim(self, kind: str, owner: str, seconds: float, states: tuple[str, str] = ("queued", "running")) -> Any:
        """Take a document that waits, or whose owner has given no sign of life; None where there is none.

        One of the namespace that has the fewest at work, so that who has many keeps nobody else waiting; among those,
        the one that has waited longest.

        Args:
            kind: what.
            owner: who takes it, for ``seconds`` without :meth:`renew`.
            seconds: see there.
            states: what waits (if it has an ``until``, from then on), and what it is from now on.

        """
        own, values = self._own()
        at_work = (
            "(SELECT COUNT(*) FROM kilotune_documents busy WHERE busy.kind = ? AND busy.state = ? AND busy.until >= ? "
            "AND busy.namespace = kilotune_documents.namespace)"
        )
        since = "CASE WHEN state = ? THEN COALESCE(until, created) ELSE created END"
        sql = (
            f"SELECT {COLUMNS} FROM kilotune_documents WHERE kind = ?{own} "
            "AND ((state = ? AND (until IS NULL OR until <= ?)) OR (state = ? AND until < ?)) "
            f"ORDER BY {at_work}, {since}, id LIMIT 1"
        )

        def work(link: Link) -> Document | None:
            now = self._clock()
            at = int(now * 1000)
            passing = f"{link.locking} SKIP LOCKED" if link.locking else ""  # what another one is just taking
            waits, works = states
            asked = (kind, *values, waits, at, works, at, kind, works, at, waits)
            row = link.one(sql + passing, asked)
            if row is None:
                return None
            made = replace(Document.of(row), state=states[1], owner=owner, until=now + seconds)
            update(link, made)
            return made

        return self._store._write(work)

    def move(self, kind: str, states: Iterable[str], to: str, until: float) -> int:
        """Bring all documents in some states into another one, from when on they may be taken; how many."""
        own, values = self._own()
        given = list(states)
        sql = (
            f"UPDATE kilotune_documents SET state = ?, until = ? WHERE kind = ?{own} "
            f"AND state IN ({', '.join('?' * len(given))})"
        )
        return self._store._write(lambda link: link.run(sql, (to, int(until * 1000), kind, *values, *given)))

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
            remove(link, found)
            return len(found)

        return self._store.erase(work) if self._store._read(over) else 0

    def shrink(self, kind: str, size: int, *, parent: str | None = None) -> int:
        """Remove the oldest of a kind until the bodies of those left have at most so many bytes; how many went.

        parent: among those that belong to it alone.
        """
        own, values = self._own()
        below, of = _below(parent)
        sql = (
            f"SELECT {COLUMNS} FROM (SELECT {COLUMNS}, SUM(size) OVER (ORDER BY id DESC) AS upto "
            f"FROM kilotune_documents WHERE kind = ?{own}{below}) AS listed WHERE upto > ?"
        )

        def work(link: Link) -> int:
            found = [Document.of(row) for row in link.rows(sql, (kind, *values, *of, size))]
            remove(link, found)
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
            if link.one(sql, (_plain(made.parent), self.namespace)) is None:
                raise AdapterError(f"there is no {made.parent!r}")
        self._check_quota(link, made.kind, made.size, quota)
        return replace(made, number=insert(link, made, pieces))

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
        return f"SELECT {COLUMNS} FROM kilotune_documents WHERE kind = ? AND name = ?{own}", (
            kind,
            _plain(name),
            *values,
        )

    def _check_quota(self, link: Link, kind: str, size: int, quota: int | None) -> None:
        if quota is None:
            return
        link.hold(f"{self.namespace} {kind}")  # two at once are counted one after the other
        sql = "SELECT COALESCE(SUM(size), 0) FROM kilotune_documents WHERE kind = ? AND namespace = ?"
        row = link.one(sql, (kind, self.namespace))
        there = 0 if row is None else int(row[0])
        if there + size > quota:
            raise QuotaError(f"{kind}: {size} bytes beside the {there} there are more than the {quota} allowed")


def _plain(name: str) -> str:
    """A name to look for. None has a NUL, which PostgreSQL takes in no text."""
    return name.replace("\0", "\ufffd")


def _below(parent: str | None) -> tuple[str, tuple[str, ...]]:
    return ("", ()) if parent is None else (" AND parent = ?", (parent,))
