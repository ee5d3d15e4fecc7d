"""verify, stats and gc of a store in a database, a page of names at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

from ...errors import CheckpointError, StoreError
from .reading import Forms, Row, kept_data, missing, of_names
from .records import Collected, Fault, Stats, unpacked_file
from .schema import Link
from .stacks import stood_on, stood_on_faults
from .writing import drop, now

__all__ = ["after", "collect_page", "collect_shared", "count_all", "faults_of", "orphans", "verify_page"]

ALL = "(the store)"
CHUNK = 32_000_000  # bytes of numbers read at once


def faults_of(link: Link, forms: Forms, namespace: str, names: Sequence[str]) -> Iterator[Fault]:
    """Everything that is wrong with the versions of these names."""
    rows = of_names(link, namespace, names, every=True, data=False)
    read: set[int] = set()  # forms whose files were looked at
    for chunk in _chunks(rows):
        places = ", ".join("?" * len(chunk))
        data = dict(
            link.rows(f"SELECT id, data FROM kilotune_payloads WHERE id IN ({places})", [r.payload for r in chunk])
        )
        for row in chunk:
            try:
                known = forms.of(link, row.form)
                found = data.get(row.payload)
                Row(**{**row.__dict__, "data": found}).record(known).tensors()
                if row.form not in read:
                    for name, sha256 in known.form.files.items():
                        unpacked_file(name, sha256, kept_data(link, name, sha256))
                    read.add(row.form)
            except (CheckpointError, ValueError) as error:
                yield Fault(row.name, row.version, str(error))
    for row, what in stood_on_faults(link, forms, rows):
        yield Fault(row.name, row.version, what)
    yield from _alias_faults(link, namespace, names)


def verify_page(link: Link, forms: Forms, namespace: str, names: Sequence[str], named: bool) -> list[Fault]:
    """What is wrong with these names; where they were ``named``, that one is not there, too."""
    faults = list(faults_of(link, forms, namespace, names))
    if named:
        there = {row.name for row in of_names(link, namespace, names, every=False, data=False)}
        lacking = [name for name in names if name not in there]
        faults += [Fault(name, None, str(missing(link, namespace, name, None))) for name in lacking]
    return faults


@contextmanager
def after(done: str | int) -> Iterator[None]:
    """Say with what stops a longer change what of it is done: a sentence, or nothing."""
    try:
        yield
    except StoreError as error:
        if not done:
            raise
        raise type(error)(f"{error} ({done})", error.told) from error


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    total = 0
    for row in rows:
        if chunk and (total + row.size > CHUNK or len(chunk) >= 500):
            yield chunk
            chunk, total = [], 0
        chunk.append(row)
        total += row.size
    if chunk:
        yield chunk


def _alias_faults(link: Link, namespace: str, names: Sequence[str]) -> Iterator[Fault]:
    places = ", ".join("?" * len(names))
    found = link.rows(
        "SELECT n.name, a.alias, a.version FROM kilotune_namespaces s JOIN kilotune_names n ON n.namespace = s.id "
        "JOIN kilotune_aliases a ON a.name = n.id "
        "LEFT JOIN kilotune_versions v ON v.name = a.name AND v.version = a.version "
        f"WHERE s.name = ? AND n.name IN ({places}) AND v.version IS NULL ORDER BY n.name, a.alias",
        (namespace, *names),
    )
    for name, alias, version in found:
        yield Fault(name, version, f"alias {alias!r} names a version that is not there")


def orphans(link: Link) -> Iterator[Fault]:
    """Numbers that belong to no version, in the whole store: what a write cut in two would leave behind."""
    row = link.one(
        "SELECT COUNT(*) FROM kilotune_payloads p LEFT JOIN kilotune_versions v ON v.payload = p.id "
        "WHERE v.payload IS NULL"
    )
    if row is not None and row[0]:
        yield Fault(ALL, None, f"{row[0]} rows of numbers belong to no version")


def count_all(link: Link, forms: Forms, namespace: str, store_bytes: int) -> Stats:
    """A namespace in numbers."""
    tables = "FROM kilotune_namespaces s JOIN kilotune_names n ON n.namespace = s.id"
    versions = f"{tables} JOIN kilotune_versions v ON v.name = n.id"
    texts = f"{link.octets('v.metadata')} + {link.octets('v.tags')}"
    by_form = link.rows(
        f"SELECT v.form, COUNT(*), SUM(v.size), SUM({texts}) {versions} WHERE s.name = ? GROUP BY v.form", (namespace,)
    )
    packed: dict[str, int] = defaultdict(int)
    for number, _, size, _ in by_form:
        packed[forms.of(link, number).form.layout.packing] += int(size)
    names = link.one(
        f"SELECT COUNT(*), SUM({link.octets('n.name')}) {tables} WHERE s.name = ? AND EXISTS "
        "(SELECT 1 FROM kilotune_versions v WHERE v.name = n.id)",
        (namespace,),
    )
    aliases = link.one(
        f"SELECT COUNT(*) {tables} JOIN kilotune_aliases a ON a.name = n.id WHERE s.name = ?", (namespace,)
    )
    assert names is not None
    assert aliases is not None
    return Stats(
        names=int(names[0]),
        versions=sum(int(count) for _, count, _, _ in by_form),
        aliases=int(aliases[0]),
        forms=len(by_form),
        packed=dict(sorted(packed.items())),
        metadata_bytes=int(names[1] or 0) + sum(int(text) for _, _, _, text in by_form),
        store_bytes=store_bytes,
    )


# -- gc --------------------------------------------------------------------------------------------


def collect_page(
    link: Link, namespace: str, names: Sequence[str], keep: int, unused_for: timedelta | None, dry_run: bool
) -> tuple[int, int]:
    """Remove the old versions of these names; (how many, bytes of their numbers)."""
    places = ", ".join("?" * len(names))
    numbers = link.rows(
        "SELECT n.id FROM kilotune_names n WHERE n.namespace = (SELECT s.id FROM kilotune_namespaces s WHERE "
        f"s.name = ?) AND n.name IN ({places}) ORDER BY n.name{'' if dry_run else link.locking}",
        (namespace, *names),
    )
    held = link.rows(
        "SELECT a.name, a.version, a.previous FROM kilotune_namespaces s JOIN kilotune_names n ON n.namespace = s.id "
        f"JOIN kilotune_aliases a ON a.name = n.id WHERE s.name = ? AND n.name IN ({places})",
        (namespace, *names),
    )
    named = {(name, version) for name, *versions in held for version in versions}
    named |= stood_on(link, [int(number) for (number,) in numbers])
    limit = None if unused_for is None else now() - int(unused_for.total_seconds() * 1e6)
    rows = _old(of_names(link, namespace, names, every=True, data=False), keep)
    gone = [
        row
        for row in rows
        if (row.name_id, row.version) not in named and (limit is None or max(row.created, row.used or 0) < limit)
    ]
    if not dry_run:
        drop(link, namespace, gone)
    return len(gone), sum(row.size for row in gone)


def _old(rows: Sequence[Row], keep: int) -> list[Row]:
    """All but the newest ``keep`` of each name."""
    by_name: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[row.name_id].append(row)
    return [row for own in by_name.values() for row in own[: max(0, len(own) - keep)]]


UNUSED: Mapping[str, str] = {  # in this order: a form may be the last that uses a base
    "forms": "NOT EXISTS (SELECT 1 FROM kilotune_versions v WHERE v.form = kilotune_forms.id)",
    "bases": "NOT EXISTS (SELECT 1 FROM kilotune_forms f WHERE f.base = kilotune_bases.id)",
    "frozen": "NOT EXISTS (SELECT 1 FROM kilotune_form_frozen f WHERE f.frozen = kilotune_frozen.id)",
}


def collect_shared(link: Link, versions: int, size: int, dry_run: bool) -> Collected:
    """Remove forms, bases and frozen tensors that no version of any namespace uses."""
    if dry_run:
        found = [link.one(f"SELECT COUNT(*) FROM kilotune_{table} WHERE {unused}") for table, unused in UNUSED.items()]
        counts = [int(row[0]) for row in found if row is not None]
    else:
        link.hold_shared()
        counts = [link.run(f"DELETE FROM kilotune_{table} WHERE {unused}") for table, unused in UNUSED.items()]
    return Collected(versions, size, *counts)
