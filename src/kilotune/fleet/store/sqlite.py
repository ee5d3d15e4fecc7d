"""A store in one SQLite file: ``sqlite:///adapters.db``.

The file is in SQLite's WAL mode: readers never wait, one writer at a time. A commit is on the disk (``synchronous =
FULL``) before the call returns; who is killed leaves the file as it was before or after, which SQLite sees to when it
is opened next. Pages are small, because a row of numbers fills whole pages: docs/store.md has the measurements.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar, final
from urllib.parse import quote

from ..._ui.sizes import readable_bytes
from ...errors import StoreError, StoreFullError, StoreLimitError
from ...injection.fingerprint import Fingerprint
from .adapter_store import ONLY_READ
from .records import Fault
from .schema import FORMAT, FORMATS, Link, statements, upgrades
from .sql import SqlStore

__all__ = ["PAGE_SIZE", "SqliteStore"]

T = TypeVar("T")
APPLICATION = 0x6B696C6F  # "kilo", in the file's header: whose it is
PAGE_SIZE = 1024
OLDEST = (3, 37)  # RETURNING is of 3.35, STRICT of 3.37
CACHE = 32_000  # KiB for each connection
CHECKPOINT = 16_000_000  # bytes of the log after which it goes into the file
WORDS = {
    "serial": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "row": "INTEGER PRIMARY KEY",
    "number": "INTEGER",
    "blob": "BLOB",
    "word": "TEXT",
    "wide": "STRICT",
    "narrow": "STRICT, WITHOUT ROWID",
}
ROOM = 64 * 1024  # bytes; with fewer on its disk, SQLite's own files beside a store do not fit
LOG_WAIT = 0.01  # seconds between attempts to cut the log
FORK_WAIT = 60.0  # seconds that a fork waits for transactions of other threads


@final
class _Connection(sqlite3.Connection):
    """A connection that knows how long it waits for others."""

    wait: float | None = None

    def waits(self, wait: float) -> None:
        """Have it wait so many seconds."""
        if wait != self.wait:
            self.execute(f"PRAGMA busy_timeout = {int(wait * 1000)}")
            self.wait = wait


@final
class SqliteLink(Link):
    """A connection of the standard library's sqlite3, inside a transaction."""

    locking: ClassVar[str] = ""
    sharing: ClassVar[str] = ""

    def __init__(self, connection: sqlite3.Connection, stacks: bool) -> None:
        self.connection, self.stacks = connection, stacks

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, values).fetchall()

    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        return self.connection.execute(sql, values).rowcount

    def many(self, sql: str, values: Iterable[Sequence[Any]]) -> None:
        self.connection.executemany(sql, values)

    def many_rows(self, sql: str, values: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        return [self.connection.execute(sql, each).fetchall()[0] for each in values]

    def payload_ids(self, count: int) -> list[int]:
        last = int(self.rows("SELECT COALESCE(MAX(id), 0) FROM kilotune_payloads")[0][0])
        return list(range(last + 1, last + 1 + count))

    def hold_shared(self) -> None:
        pass  # there is one writer at a time

    def hold(self, word: str) -> None:
        pass

    def octets(self, column: str) -> str:
        return f"LENGTH(CAST({column} AS BLOB))"


@final
class SqliteStore(SqlStore):
    """See :class:`AdapterStore`; made by :func:`open_store`."""

    def __init__(
        self,
        url: str,
        path: Path,
        namespace: str,
        base: Fingerprint | None = None,
        packing: str = "float32",
        read_only: bool = False,
        timeout: float = 60.0,
    ) -> None:
        super().__init__(url, namespace, base, packing, read_only, timeout)
        if sqlite3.sqlite_version_info < OLDEST:
            raise StoreError(f"SQLite {sqlite3.sqlite_version} is too old: a store needs {'.'.join(map(str, OLDEST))}")
        self.path = path.absolute()
        self._format = FORMAT  # at least
        self._idle: list[_Connection] = []
        self._lock, self._taken = threading.Condition(), 0
        if read_only and not path.is_file():
            raise StoreError(f"there is no store at {path}")
        if not path.parent.is_dir():
            raise StoreError(f"cannot make a store at {path}: there is no folder {path.parent}")
        new = not path.exists()
        try:
            with self._guarded():
                first = self._first()
        except StoreFullError:
            if new and path.is_file() and not path.stat().st_size:
                path.unlink()
            raise
        self._file = _identity(self.path)
        self._writing = _turn_of(self._file)
        self._taken = 1
        self._give_back(first)
        self._enlist()

    @property
    def _busy(self) -> str:
        return f"others have written to it for {self.timeout:g} seconds on end"

    # -- connections -------------------------------------------------------------------------------

    def _connect(self) -> _Connection:
        mode = "ro" if self.read_only else "rwc"
        if self.read_only and not _can_lock(self.path):
            mode = "ro&immutable=1"  # on a file system that nobody can write to
        made = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode={mode}",
            uri=True,
            timeout=self.timeout,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            factory=_Connection,
        )
        try:
            made.execute("PRAGMA foreign_keys = ON")
            made.execute("PRAGMA trusted_schema = OFF")  # somebody else may have made the file
            made.execute("PRAGMA synchronous = FULL")
            made.execute("PRAGMA secure_delete = ON")  # what was changed or deleted is not left in a page's free part
            made.execute(f"PRAGMA cache_size = -{CACHE}")
            if self.read_only:
                made.execute("PRAGMA query_only = ON")
        except BaseException:
            made.close()
            raise
        return made

    def _first(self) -> _Connection:
        """The first connection: makes the tables where the file is new, and sees that it is a store."""
        made = self._connect()
        try:
            owner, form = (
                int(made.execute(f"PRAGMA {word}").fetchone()[0]) for word in ("application_id", "user_version")
            )
            empty = made.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0] == 0
            if empty and owner == 0 and not self.read_only:
                self._make_tables(made)
            elif owner != APPLICATION:
                raise StoreError(
                    f"{self.path} is {'empty' if empty else 'an SQLite file of another program'}, no store"
                )
            elif form not in FORMATS:
                raise StoreError(f"{self.path} has format {form}, this kilotune reads {FORMAT}; a newer one is needed")
            else:
                self._format = form
            size = int(made.execute("PRAGMA page_size").fetchone()[0])
            made.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT // size}")
        except BaseException:
            made.close()
            raise
        return made

    def _make_tables(self, made: sqlite3.Connection) -> None:
        made.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        self._to_log(made)
        made.execute("BEGIN IMMEDIATE")
        try:
            if (
                made.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0] == 0
            ):  # else another process was quicker
                for statement in statements(WORDS):
                    made.execute(statement)
                made.execute(f"PRAGMA application_id = {APPLICATION}")
                made.execute(f"PRAGMA user_version = {FORMAT}")
            made.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # it says less than what went wrong
                made.execute("ROLLBACK")
            raise

    def _to_log(self, made: sqlite3.Connection) -> None:
        """Turn on the log; SQLite does not wait for others there, so this does."""
        end = time.monotonic() + self.timeout
        while True:
            try:
                made.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(random.uniform(0.001, 0.02))

    def _take(self) -> _Connection:
        with self._lock:
            self._open()
            self._check_file()
            self._taken += 1
            if self._idle:
                return self._idle.pop()
        try:
            made = self._connect()
            size = int(made.execute("PRAGMA page_size").fetchone()[0])
            made.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT // size}")
        except BaseException:
            self._give_back(None)
            raise
        return made

    def _check_file(self) -> None:
        """Refuse to go on with a file that is no longer at its path: what is written there is lost at the end."""
        if (now := _identity(self.path)) != self._file:
            what = "is not there any more" if now is None else "was replaced by another file"
            raise StoreError(f"{self.path} {what} since it was opened; put it back, or open the store anew")

    def _give_back(self, connection: _Connection | None) -> None:
        with self._lock:
            if connection is not None and self._closed:
                connection.close()
            elif connection is not None:
                self._idle.append(connection)
            self._taken -= 1
            self._lock.notify_all()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._ours(error) from error

    def _ours(self, error: sqlite3.Error) -> StoreError:
        text, kind = str(error), getattr(error, "sqlite_errorcode", 0) & 0xFF  # above that byte is more of the same
        lacks = kind in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and _free(self.path) < ROOM
        if kind == sqlite3.SQLITE_FULL or lacks:
            return StoreFullError(
                f"{self.path}: the disk is full ({readable_bytes(_free(self.path))} free), so nothing was changed; "
                "opening a store and removing from it take some room, too, for SQLite's log: make room, and do it again"
            )
        if "locked" in text or "busy" in text:
            return StoreError(f"{self.path}: {self._busy} ({text}); try again later", f"is busy: {self._busy}")
        if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN) and (why := _not_writable(self.path)):
            if self.read_only:
                text = f"{why}, and while nobody has it open, SQLite must be able to make two files beside it"
                return StoreError(f"{self.path} cannot be read: {text}")
            return StoreLimitError(f"{self.path} cannot be changed: {why}; open it read-only to read it", ONLY_READ)
        return StoreError(f"{self.path}: {text}")

    @contextmanager
    def _transaction(self, begin: str, wait: float) -> Iterator[Link]:
        with self._guarded():
            connection = self._take()
            try:
                connection.waits(wait)
                connection.execute(begin)
                yield SqliteLink(connection, self._has_stacks(connection))
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                raise
            finally:
                self._give_back(connection)

    def _has_stacks(self, connection: sqlite3.Connection) -> bool:
        """Whether the file is of a format that has stacks; an older one may have been upgraded meanwhile."""
        if self._format < FORMAT:
            self._format = int(connection.execute("PRAGMA user_version").fetchone()[0])
        return self._format >= FORMAT

    @staticmethod
    def _upgrade(link: Link) -> None:
        """Bring an older file to this format, in the transaction of the first change in it."""
        for statement in (*upgrades(WORDS), f"PRAGMA user_version = {FORMAT}"):
            link.run(statement)
        link.stacks = True

    def _read(self, work: Callable[[Link], T]) -> T:
        with self._transaction("BEGIN", self.timeout) as link:
            return work(link)

    def _write(self, work: Callable[[Link], T], patient: bool = True) -> T:
        self._open()
        # Threads of one process wait here, where it is their turn as soon as the one before is done.
        if not self._writing.acquire(timeout=self.timeout if patient else 0):
            raise StoreError(f"{self.path}: {self._busy}; try again later", f"is busy: {self._busy}")
        lock = self._writing
        try:
            with self._transaction("BEGIN IMMEDIATE", self.timeout if patient else 0.0) as link:
                if not link.stacks:
                    self._upgrade(link)
                return work(link)
        finally:
            lock.release()

    def make_tables(self, made: Iterable[str]) -> None:
        with self._transaction("BEGIN", self.timeout) as link:
            there = {name for (name,) in link.rows("SELECT name FROM sqlite_schema")}
        wanted = [text for text in made if text.split()[5] not in there]  # CREATE TABLE IF NOT EXISTS name
        if wanted:
            self._write(lambda link: [link.run(text.format(**WORDS)) for text in wanted])

    def erase(self, work: Callable[[Link], T]) -> T:
        found = self._write(work)
        until = time.monotonic() + self.timeout
        while self._log_is_kept():  # somebody reads on from before, or does just this, for which SQLite does not wait
            if time.monotonic() >= until:
                raise StoreError(f"{self.path}: what was deleted is gone, but not from SQLite's log yet: {self._busy}")
            time.sleep(LOG_WAIT)
        return found

    def _log_is_kept(self) -> bool:
        """Bring what the log has into the file, and cut it; whether that could not be done."""
        with self._guarded():
            connection = self._take()
            try:
                connection.waits(self.timeout)
                ((busy, *_),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            finally:
                self._give_back(connection)
        return bool(busy)

    def before_fork(self) -> None:
        """Close all connections, once other threads are done with them; they are opened again when they are needed.

        SQLite notes in the process what it has locked, and the system gives a child none of its parent's locks: a
        child that inherits an open file would think that it has locks, and could damage the file.
        """
        self._lock.acquire()
        self._lock.wait_for(lambda: self._taken == 0, FORK_WAIT)
        while self._idle:
            self._idle.pop().close()

    def after_fork(self) -> None:
        self._lock.release()

    def _leave_connections(self) -> None:
        self._lock, self._writing, self._taken = threading.Condition(), _turn_of(self._file), 0

    def _disconnect(self) -> None:
        with self._lock:
            while self._idle:
                self._idle.pop().close()

    # -- the file ----------------------------------------------------------------------------------

    def _store_bytes(self) -> int:
        files = (self.path, self.path.with_name(f"{self.path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def _compact(self) -> None:
        with self._guarded(), self._writing:
            connection = self._take()
            try:
                connection.execute("VACUUM")
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                self._give_back(connection)

    def _damage(self) -> Iterator[Fault]:
        def work(link: Link) -> list[Fault]:
            found = [str(text) for (text,) in link.rows("PRAGMA integrity_check(20)")]
            lost = link.rows("PRAGMA foreign_key_check")
            faults = [Fault("(the store)", None, text) for text in found if text != "ok"]
            return faults + [Fault("(the store)", None, f"a row of {row[0]} refers to nothing") for row in lost[:20]]

        yield from self._read(work)


_turns: dict[tuple[int, tuple[int, int] | None], threading.Lock] = {}  # by process, for forks, and file


def _turn_of(file: tuple[int, int] | None) -> threading.Lock:
    """What those who write to a file in this process hold: SQLite itself has them wait in naps."""
    return _turns.setdefault((os.getpid(), file), threading.Lock())


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file a path leads to."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _free(path: Path) -> int:
    """Bytes that the disk of a store has left."""
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return ROOM


def _not_writable(path: Path) -> str | None:
    """Why SQLite cannot write to a store."""
    if os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        return "its file system is mounted read-only"
    if path.exists() and not os.access(path, os.W_OK):
        return "this user may not write to the file"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"this user may not write into {path.parent}"
    return None


def _can_lock(path: Path) -> bool:
    """Whether SQLite can put its files beside the store, or somebody has already."""
    if path.with_name(f"{path.name}-shm").exists():
        return True
    return not os.statvfs(path.parent).f_flag & os.ST_RDONLY
