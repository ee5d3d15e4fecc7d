"""An adapter store in a database: what SQLite and PostgreSQL have in common, which is nearly all.

Every change is one transaction, and every read works on one snapshot, so nobody ever sees a part of a change. A change
takes the row of its name first (SQLite: the whole file), so changes of one adapter come one after the other.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

from ...adapter_files.names import composed
from ...errors import (
    AdapterError,
    ConfigError,
    KilotuneError,
    StoreError,
    StoreFullError,
    StoreLimitError,
    gather,
)
from ...injection.fingerprint import Fingerprint
from . import reading, stacks, upkeep, writing
from .adapter_store import Adapter, AdapterStore, Item, Which
from .forks import Forking
from .more_tables import MoreTables
from .names import (
    check_alias,
    check_limit,
    check_name,
    check_namespace,
    check_new_name,
    check_new_word,
    check_packing,
    check_tags,
    check_which,
    literal_prefix,
    matches,
    spellings,
)
from .preparing import Below, Preparer, Ready, batches
from .reading import Forms, Row
from .records import Collected, Fault, Record, SharedVersion, Standing, Stats, Version
from .schema import Link

__all__ = ["SqlStore"]

T = TypeVar("T")
PAGE = 500  # names read at once
CHUNK = 32_000_000  # bytes of numbers read or written at once, about
NOTES = 1000  # reads that are noted together
NOTED_EVERY = 60.0  # seconds
SHARED_KEPT = 256  # shared adapters whose content_sha256 is remembered


class SqlStore(AdapterStore, Forking, MoreTables, ABC):
    """What does not depend on the database; see :class:`AdapterStore` for what the methods promise."""

    def __init__(
        self, url: str, namespace: str, base: Fingerprint | None, packing: str, read_only: bool, timeout: float
    ) -> None:
        self.url, self.namespace, self.base, self.read_only = url, check_namespace(namespace), base, read_only
        self.timeout = timeout
        self._prepare = Preparer(base, packing)
        self._forms = Forms(self._kept_file)
        self._notes: dict[tuple[int, int], int] = {}
        self._noted = time.monotonic()
        self._notes_lock = threading.Lock()
        self._closed = False
        self._contents: dict[str, str] = {}  # content_sha256 of shared adapters, by their hash here

    def forked(self) -> None:
        self._notes_lock = threading.Lock()
        self._notes = {}  # the parent will write them down
        self._prepare.forked()
        self._forms = Forms(self._kept_file)
        self._leave_connections()

    # -- what a database brings -------------------------------------------------------------------

    @abstractmethod
    def _read(self, work: Callable[[Link], T]) -> T:
        """Run ``work`` on one snapshot of the store."""

    def _kept_file(self, name: str, sha256: str) -> bytes:
        """A file that adapters bring, as it is kept."""
        return self._read(lambda link: reading.kept_data(link, name, sha256))

    @abstractmethod
    def _write(self, work: Callable[[Link], T], patient: bool = True) -> T:
        """Run ``work`` in a transaction, all or nothing, on disk when this returns; again where others were in the way.

        ``patient``: wait for others, else raise StoreError at once.
        """

    @abstractmethod
    def _leave_connections(self) -> None:
        """In a child process: begin anew, and never touch the parent's connections, not even to close them."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close all connections."""

    @abstractmethod
    def _store_bytes(self) -> int:
        """What the whole store takes on disk."""

    @abstractmethod
    def _compact(self) -> None:
        """Give unused space back."""

    @abstractmethod
    def _damage(self) -> Iterator[Fault]:
        """What the database itself finds wrong."""

    def _changing(self, work: Callable[[Link], T]) -> T:
        self.check_writable()
        return self._write(work)

    def _open(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.url} is closed; open it again")

    # -- names -------------------------------------------------------------------------------------

    def _named(self, name: str) -> str:
        """A name as the store has it: in NFC, or as it is given, where it was put so before names were composed."""
        name = check_name(name)
        right = composed(name)
        return name if name == right or self._there([name]) else right

    def name_for(self, name: str) -> str:
        name = check_name(name)
        if name.isascii() or name in (there := self._there(spellings(name))):
            return name
        new = check_new_name(name)
        if there and new not in there:
            raise AdapterError(
                f"adapter name {name!a}: the store has it as {there.pop()!a}, from before names were kept in Unicode's "
                "form NFC; put it under that name, or remove that one first"
            )
        return new

    def _there(self, names: Sequence[str]) -> set[str]:
        return self._read(lambda link: reading.which_are_there(link, self.namespace, names))

    # -- one adapter -------------------------------------------------------------------------------

    def put(
        self,
        name: str,
        adapter: Adapter,
        *,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        alias: str | None = None,
        packing: str | None = None,
        adapter_name: str | None = None,
        on: str | SharedVersion | None = None,
    ) -> Version:
        word = None if alias is None else check_new_word("alias", check_alias(alias))
        ready = self._prepare(self.name_for(name), adapter, metadata, tags, packing, adapter_name, self._below(on))
        return self._changing(lambda link: writing.write_batch(link, self.namespace, [ready], word))[0]

    def put_once(
        self,
        name: str,
        adapter: Adapter,
        *,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        alias: str | None = None,
        packing: str | None = None,
        adapter_name: str | None = None,
        on: str | SharedVersion | None = None,
        first: bool = False,
    ) -> tuple[Version, bool]:
        word = None if alias is None else check_new_word("alias", check_alias(alias))
        ready = self._prepare(self.name_for(name), adapter, metadata, tags, packing, adapter_name, self._below(on))
        return self._changing(lambda link: writing.write_once(link, self.namespace, ready, word, first))

    def _below(self, on: str | SharedVersion | None) -> Below | None:
        """What ``on`` means now."""
        if on is None:
            return None
        if len(self._contents) > SHARED_KEPT:
            self._contents.clear()
        return self._read(lambda link: stacks.below(link, self._forms, self._contents, self.namespace, on))

    def settle(self, on: str | SharedVersion) -> SharedVersion:
        return self._read(lambda link: stacks.find_shared(link, self._forms, self.namespace, on)[2])

    def find_shared(self, on: str | SharedVersion) -> Record:
        record = self._read(lambda link: stacks.find_shared(link, self._forms, self.namespace, on)[1])
        self._check_base(record)
        return record

    def shared_of(self, version: Version) -> Record:
        record = self._read(lambda link: stacks.record_below(link, self._forms, self.namespace, version))
        self._check_base(record)
        return record

    def standing_on(self, name: str, version: Which = None) -> Standing:
        name, which = self._named(name), check_which(version)

        def work(link: Link) -> Standing:
            row = reading.find(link, self.namespace, name, which, data=False)
            return stacks.standing(link, self.namespace, [row])

        return self._read(work)

    def get(self, name: str, version: Which = None) -> Record:
        name, which = self._named(name), check_which(version)

        def work(link: Link) -> tuple[Row, Record]:
            row = reading.find(link, self.namespace, name, which, data=True)
            return row, row.record(self._forms.of(link, row.form))

        row, record = self._read(work)
        self._check_base(record)
        self._note([row])
        return record

    def info(self, name: str, version: Which = None) -> Version:
        name, which = self._named(name), check_which(version)

        def work(link: Link) -> Version:
            row = reading.find(link, self.namespace, name, which, data=False)
            return row.info(self._forms.of(link, row.form).form)

        return self._read(work)

    def versions(self, name: str) -> list[Version]:
        return self._infos([self._named(name)], every=True)

    def _infos(self, names: Sequence[str], every: bool) -> list[Version]:
        def work(link: Link) -> list[Version]:
            rows = reading.of_names(link, self.namespace, names, every=every, data=False)
            return [row.info(self._forms.of(link, row.form).form) for row in rows]

        return self._read(work)

    def _check_base(self, record: Record) -> None:
        if self.base is not None and record.form.base is not None:
            what = f"{record.info.name!r} (version {record.info.version})"
            record.form.base.check(self.base, what, record.form.saved_whole)

    def rm(self, name: str, version: Which = None, *, force: bool = False) -> int:
        name, which = self._named(name), check_which(version)
        every = version is None
        return self._changing(lambda link: writing.remove(link, self.namespace, name, which, every, force))

    # -- aliases -----------------------------------------------------------------------------------

    def alias(self, name: str, alias: str, version: Which = None, *, expected: int | None = None) -> int:
        word, which = check_new_word("alias", check_alias(alias)), check_which(version)
        name = self._named(name)
        return self._changing(lambda link: writing.move_alias(link, self.namespace, name, word, which, expected))

    def roll_out(self, alias: str, versions: Mapping[str, Which]) -> dict[str, int]:
        word = check_new_word("alias", check_alias(alias))
        wanted = {self._named(name): check_which(which) for name, which in sorted(versions.items())}

        def work(link: Link) -> dict[str, int]:
            return {name: writing.move_alias(link, self.namespace, name, word, which) for name, which in wanted.items()}

        return self._changing(work)

    def roll_back(self, alias: str, names: Iterable[str]) -> dict[str, int]:
        word = check_alias(alias)
        wanted = sorted({self._named(name) for name in _listed(names)})
        return self._changing(lambda link: writing.swap_aliases(link, self.namespace, word, wanted))

    def unalias(self, name: str, alias: str) -> None:
        name, word = self._named(name), check_alias(alias)
        self._changing(lambda link: writing.drop_alias(link, self.namespace, name, word))

    def aliases(self, name: str) -> dict[str, int]:
        name = self._named(name)
        found = self._read(lambda link: reading.aliases_of(link, self.namespace, name))
        return {alias: version for alias, version, _ in found}

    # -- many --------------------------------------------------------------------------------------

    def put_many(
        self,
        items: Iterable[Item],
        *,
        alias: str | None = None,
        packing: str | None = None,
        batch: int = 1000,
        done: Callable[[Sequence[Version]], None] | None = None,
        failed: Callable[[Item, KilotuneError], None] | None = None,
    ) -> int:
        word = None if alias is None else check_new_word("alias", check_alias(alias))
        count = 0
        if packing is not None:
            check_packing(packing)
        for part in batches(self._prepared(items, packing, failed), _positive("batch", batch), CHUNK):
            found = self._changing(_writer(self.namespace, part, word))
            count += len(found)
            if done is not None:
                done(found)
        return count

    def _prepared(
        self, items: Iterable[Item], packing: str | None, failed: Callable[[Item, KilotuneError], None] | None
    ) -> Iterator[Ready]:
        known: dict[str | SharedVersion | None, Below | None] = {}
        for item in items:
            try:
                if item.on not in known:
                    known[item.on] = self._below(item.on)
                name, below = self.name_for(item.name), known[item.on]
                ready = self._prepare(name, item.adapter, item.metadata, item.tags, packing, below=below)
            except KilotuneError as error:
                if failed is None:
                    raise
                failed(item, error)
            else:
                yield ready

    def get_many(self, names: Iterable[str], version: Which = None) -> Iterator[Record]:
        which = check_which(version)
        left = iter([self._named(name) for name in _listed(names)])
        size = 1  # of the first batch; then as many as memory allows
        while part := list(islice(left, max(1, min(PAGE, CHUNK // size)))):
            records = self._records(part, which)
            size = max(1, *(record.info.size for record in records.values()))
            yield from (records[name] for name in part)

    def _records(self, names: Sequence[str], which: int | str | None) -> dict[str, Record]:
        def work(link: Link) -> tuple[list[Row], dict[str, Record]]:
            rows = reading.of_names(link, self.namespace, sorted({*names}), which, every=False, data=True)
            found = {row.name: row.record(self._forms.of(link, row.form)) for row in rows}
            lacking = sorted({*names} - {*found})
            faults = [str(reading.missing(link, self.namespace, name, which)) for name in lacking[:20]]
            if faults:
                raise AdapterError(gather(f"{len(lacking)} of {len({*names})} are not there:", faults))
            return rows, found

        rows, found = self._read(work)
        for record in found.values():
            self._check_base(record)
        self._note(rows)
        return found

    def ls(
        self,
        pattern: str | None = None,
        *,
        tags: Sequence[str] = (),
        versions: bool = False,
        after: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Version]:
        words, start, most = check_tags(tags), "" if after is None else check_name(after), check_limit(limit)
        found = self._listed(pattern, words, versions, start)
        return islice(found, most)

    def names(self, pattern: str | None = None) -> Iterator[str]:
        pages = self._pages(literal_prefix(pattern))
        return (name for page in pages for name, fits in zip(page, matches(pattern, page)) if fits)

    def _listed(self, pattern: str | None, tags: tuple[str, ...], every: bool, after: str) -> Iterator[Version]:
        prefix, tag = literal_prefix(pattern), tags[0] if tags else None
        for page in self._pages(prefix, tag, after):
            chosen = [name for name, fits in zip(page, matches(pattern, page)) if fits]
            found = self._infos(chosen, every) if chosen else []
            yield from (info for info in found if {*tags} <= {*info.tags})

    def _pages(self, prefix: str = "", tag: str | None = None, after: str = "") -> Iterator[list[str]]:
        """All names, a page at a time."""
        while page := self._read(_pager(self.namespace, after, prefix, tag)):
            yield page
            after = page[-1]

    # -- upkeep ------------------------------------------------------------------------------------

    def verify(self, names: Iterable[str] | None = None) -> Iterator[Fault]:
        wanted = None if names is None else sorted({self._named(name) for name in _listed(names)})
        return self._verified(wanted)

    def _verified(self, names: list[str] | None) -> Iterator[Fault]:
        if names is None:
            yield from self._damage()
            yield from self._read(lambda link: list(upkeep.orphans(link)))
        pages = self._pages() if names is None else [names[i : i + PAGE] for i in range(0, len(names), PAGE)]
        forms = Forms(self._kept_file)  # read anew, not those that a handle remembers
        for page in pages:
            yield from self._read(_verifier(self.namespace, page, forms, named=names is not None))

    def stats(self) -> Stats:
        size = self._store_bytes()
        return self._read(lambda link: upkeep.count_all(link, self._forms, self.namespace, size))

    def gc(
        self,
        *,
        keep: int | None = None,
        unused_for: timedelta | None = None,
        compact: bool = False,
        dry_run: bool = False,
    ) -> Collected:
        if unused_for is not None and keep is None:
            raise ConfigError("gc: unused_for narrows what keep lets go, so give keep as well")
        run = self._read if dry_run else self._changing
        if not dry_run:
            self.flush()
        versions = size = 0
        if keep is not None:
            least = _positive("keep", keep)
            for page in self._pages():
                with upkeep.after(versions and f"{versions:,} versions were removed before that"):
                    gone, freed = run(_collector(self.namespace, page, least, unused_for, dry_run))
                versions, size = versions + gone, size + freed
        with upkeep.after(versions and f"{versions:,} versions were removed before that"):
            result = run(lambda link: upkeep.collect_shared(link, versions, size, dry_run))
        if compact and not dry_run:
            with upkeep.after("what was to be removed is removed, and its room is used again; only compacting failed"):
                self._compact()
        return result

    def close(self) -> None:
        if not self._closed:
            try:
                with suppress(StoreFullError, StoreLimitError):  # when adapters were read is no reason for an error
                    self.flush()
            finally:
                self._closed = True
                self._disconnect()

    # -- when what was read ------------------------------------------------------------------------

    def flush(self) -> None:
        """Write down when adapters were read; otherwise that is done now and then, and when the store is closed."""
        with self._notes_lock:
            notes, self._notes, self._noted = self._notes, {}, time.monotonic()
        if notes:
            try:
                self._write(lambda link: writing.note_used(link, notes))
            except StoreError:
                with self._notes_lock:
                    self._notes = {**notes, **self._notes}
                raise

    def _note(self, rows: Iterable[Row]) -> None:
        if self.read_only:
            return
        when = writing.now()
        with self._notes_lock:
            for row in rows:
                if row.used is None or when - row.used > NOTED_EVERY * 1e6:
                    self._notes[(row.name_id, row.version)] = when
            due = len(self._notes) >= NOTES or (self._notes and time.monotonic() - self._noted > NOTED_EVERY)
            if not due:
                return
            notes, self._notes, self._noted = self._notes, {}, time.monotonic()
        try:
            self._write(lambda link: writing.note_used(link, notes), patient=False)
        except StoreError:  # who reads does not wait for who writes
            with self._notes_lock:
                self._notes = {**notes, **self._notes}


def _writer(namespace: str, part: Sequence[Ready], alias: str | None) -> Callable[[Link], list[Version]]:
    return lambda link: writing.write_batch(link, namespace, part, alias)


def _pager(namespace: str, after: str, prefix: str, tag: str | None) -> Callable[[Link], list[str]]:
    return lambda link: reading.names_after(link, namespace, after, prefix, tag, PAGE)


def _verifier(namespace: str, names: Sequence[str], forms: Forms, named: bool) -> Callable[[Link], list[Fault]]:
    return lambda link: upkeep.verify_page(link, forms, namespace, names, named)


def _collector(
    namespace: str, names: Sequence[str], keep: int, unused_for: timedelta | None, dry_run: bool
) -> Callable[[Link], tuple[int, int]]:
    return lambda link: upkeep.collect_page(link, namespace, names, keep, unused_for, dry_run)


def _listed(names: Iterable[str]) -> Iterable[str]:
    if isinstance(names, str):
        raise AdapterError(f"expected several names, got the one text {names!r}; put it into a list")
    return names


def _positive(what: str, number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"{what}: expected a whole number from 1, got {number!r}")
    return number
