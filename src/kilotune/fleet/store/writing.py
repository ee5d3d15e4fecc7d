"""Into the tables, inside a transaction of the caller's."""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from safetensors.torch import save

from ...adapter_files.names import check_shown
from ...errors import AdapterError, StoreError, gather
from ...injection.fingerprint import Fingerprint
from . import stacks
from .preparing import Ready
from .reading import NOTHING, Below, Row, aliases_of, find, missing, of_names
from .records import Version
from .schema import Link

__all__ = [
    "drop",
    "drop_alias",
    "move_alias",
    "now",
    "purge",
    "remove",
    "swap_aliases",
    "take_name",
    "write_batch",
    "write_once",
]

ALIAS = (
    "INSERT INTO kilotune_aliases (name, alias, version, previous) VALUES (?, ?, ?, NULL) ON CONFLICT (name, alias) "
    "DO UPDATE SET previous = kilotune_aliases.version, version = excluded.version"
)


def now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


# -- put -------------------------------------------------------------------------------------------


def write_batch(link: Link, namespace: str, batch: Sequence[Ready], alias: str | None) -> list[Version]:
    """Write adapters as the newest versions of their names; what was written, in the order of the batch."""
    space = _namespace(link, namespace)
    stacks.hold(link, [one.below for one in batch if one.below is not None])
    forms = {one.form.sha256: one for one in batch}
    numbers = {sha256: _form(link, forms[sha256]) for sha256 in sorted(forms)}
    counts = sorted(
        Counter(one.name for one in batch).items()
    )  # in one order, so that no two writers wait for each other
    given = link.many_rows(
        "INSERT INTO kilotune_names (namespace, name, next) VALUES (?, ?, ?) ON CONFLICT (namespace, name) "
        "DO UPDATE SET next = kilotune_names.next + excluded.next - 1 RETURNING id, next",
        [(space, name, count + 1) for name, count in counts],
    )
    left = {name: (number, after - count) for (name, count), (number, after) in zip(counts, given)}
    rows: list[Row] = []
    for one, payload in zip(batch, link.payload_ids(len(batch))):
        number, version = left[one.name]
        left[one.name] = (number, version + 1)
        form, size, tags = numbers[one.form.sha256], len(one.packed), _text(one.tags)
        own = (number, one.name, version, form, payload, size, now(), None, one.sha256, one.metadata, tags)
        rows.append(Row(*own, below=_below(one), data=one.packed))
    _write_rows(link, rows)
    tagged = [(space, tag, row.name, row.version) for one, row in zip(batch, rows) for tag in one.tags]
    link.many("INSERT INTO kilotune_tags (namespace, tag, name, version) VALUES (?, ?, ?, ?)", tagged)
    if alias is not None:
        link.many(ALIAS, [(row.name_id, alias, row.version) for row in rows])
    return [row.info(one.form) for one, row in zip(batch, rows)]


def write_once(link: Link, namespace: str, one: Ready, alias: str | None, first: bool) -> tuple[Version, bool]:
    """Write an adapter as the newest version of its name, unless the newest one is it: (that version, is it new).

    first: unless there is any.
    """
    space = _namespace(link, namespace)
    stacks.hold(link, [] if one.below is None else [one.below])
    _form(link, one)  # forms before names, as in write_batch, so that no two writers wait for each other
    link.run(
        "INSERT INTO kilotune_names (namespace, name, next) VALUES (?, ?, 1) ON CONFLICT (namespace, name) "
        "DO UPDATE SET next = kilotune_names.next",  # from here on nobody else writes a version of this name
        (space, one.name),
    )
    there = of_names(link, namespace, [one.name], every=False, data=False)
    if not there or not (first or _same(link, there[0], one)):
        return write_batch(link, namespace, [one], alias)[0], True
    if alias is not None:
        move_alias(link, namespace, one.name, alias, there[0].version)
    return there[0].info(one.form), False


def _same(link: Link, row: Row, one: Ready) -> bool:
    """Whether a version is this adapter; its numbers as they are there now, so that a damaged one is nobody's same."""
    was = bytes(row.sha256), row.metadata, row.tags, row.below
    if was != (one.sha256, one.metadata, _text(one.tags), _below(one)):
        return False
    numbers = link.one("SELECT data FROM kilotune_payloads WHERE id = ?", (row.payload,))
    return numbers is not None and bytes(numbers[0]) == one.packed


def _below(one: Ready) -> Below:
    if one.below is None:
        return NOTHING
    place = one.below.place
    return one.below.number, place.version, place.name, place.namespace, place.version


def _text(tags: Sequence[str]) -> str:
    return json.dumps(tags, separators=(",", ":"), ensure_ascii=False)


def _write_rows(link: Link, rows: Sequence[Row]) -> None:
    link.many("INSERT INTO kilotune_payloads (id, data) VALUES (?, ?)", [(row.payload, row.data) for row in rows])
    link.many(
        "INSERT INTO kilotune_versions (name, version, form, payload, size, created, sha256, metadata, tags, "
        "shared_name, shared_version) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (r.name_id, r.version, r.form, r.payload, r.size, r.created, r.sha256, r.metadata, r.tags, *r.below[:2])
            for r in rows
        ],
    )


def _namespace(link: Link, namespace: str) -> int:
    select = "SELECT id FROM kilotune_namespaces WHERE name = ?"
    if (row := link.one(select, (namespace,))) is None:
        check_shown("namespace", namespace)
        link.run("INSERT INTO kilotune_namespaces (name) VALUES (?) ON CONFLICT (name) DO NOTHING", (namespace,))
        row = link.one(select, (namespace,))
    assert row is not None  # a namespace is never deleted
    return int(row[0])


def _form(link: Link, one: Ready) -> int:
    form = one.form
    frozen = {key: _shared(link, "frozen", form.shared[key], save({"": one.frozen[key]})) for key in form.shared}
    for name, sha256 in form.files.items():
        frozen[name] = _file(link, sha256, one.files[name])
    base = None if form.base is None else _base(link, form.base)
    number = _shared(link, "forms", form.sha256, zlib.compress(form.text.encode()), base)
    link.many(
        "INSERT INTO kilotune_form_frozen (form, frozen) VALUES (?, ?) ON CONFLICT (form, frozen) DO NOTHING",
        [(number, kept) for kept in sorted(set(frozen.values()))],
    )
    return number


def _file(link: Link, sha256: str, data: bytes) -> int:
    """Where a file is, which is made small only where it is not there yet."""
    there = link.one(f"SELECT id FROM kilotune_frozen WHERE sha256 = ?{link.sharing}", (bytes.fromhex(sha256),))
    return _shared(link, "frozen", sha256, zlib.compress(data)) if there is None else int(there[0])


def _base(link: Link, base: Fingerprint) -> int:
    return _shared(link, "bases", base.sha256, zlib.compress(base.to_json().encode()))


def _shared(link: Link, table: str, sha256: str, data: bytes, base: int | None = None) -> int:
    """The number of what many adapters have in common, which stays until the transaction ends."""
    select = f"SELECT id FROM kilotune_{table} WHERE sha256 = ?{link.sharing}"
    key = bytes.fromhex(sha256)
    columns, values = ("sha256, data", (key, data)) if base is None else ("sha256, data, base", (key, data, base))
    places = ", ".join("?" * len(values))
    insert = f"INSERT INTO kilotune_{table} ({columns}) VALUES ({places}) ON CONFLICT (sha256) DO NOTHING"
    for _ in range(10):  # somebody's gc may take it away between the two
        if (row := link.one(select, (key,))) is not None:
            return int(row[0])
        link.run(insert, values)
    raise StoreError(f"{table} {sha256[:12]} goes as soon as it is written; is another kilotune at work in the store?")


# -- aliases ---------------------------------------------------------------------------------------


def take_name(link: Link, namespace: str, name: str) -> int:
    """The number of a name, whose row nobody else changes until the transaction ends.

    Raises:
        AdapterError: there is no adapter of that name.

    """
    row = link.one(
        "SELECT n.id FROM kilotune_names n WHERE n.name = ? AND n.namespace = "
        f"(SELECT s.id FROM kilotune_namespaces s WHERE s.name = ?){link.locking}",
        (name, namespace),
    )
    if row is None:
        raise missing(link, namespace, name, None)
    return int(row[0])


def move_alias(
    link: Link, namespace: str, name: str, alias: str, which: int | str | None, expected: int | None = None
) -> int:
    """Let an alias name a version; returns the version's number."""
    number = take_name(link, namespace, name)
    version = find(link, namespace, name, which, data=False).version
    row = link.one("SELECT version FROM kilotune_aliases WHERE name = ? AND alias = ?", (number, alias))
    current = 0 if row is None else int(row[0])
    if expected is not None and expected != current:
        names = f"names version {current}" if current else "is not there"
        wanted = f"version {expected}" if expected else "no such alias"
        raise AdapterError(f"{name!r}: expected {wanted}, but {alias!r} {names}; nothing was changed")
    if version != current:  # else what it named before stays what it rolls back to
        link.run(ALIAS, (number, alias, version))
    return version


def swap_aliases(link: Link, namespace: str, alias: str, names: Iterable[str]) -> dict[str, int]:
    """Let an alias name what it named before, for all names or none."""
    found, faults = {}, []
    for name in names:
        number = take_name(link, namespace, name)
        versions = {word: previous for word, _, previous in aliases_of(link, namespace, name)}
        if alias not in versions:
            faults.append(str(missing(link, namespace, name, alias)))
        elif (previous := versions[alias]) is None:
            faults.append(f"{name!r}: {alias!r} has not been moved, or what it named before was removed")
        else:
            link.run(
                "UPDATE kilotune_aliases SET version = previous, previous = version WHERE name = ? AND alias = ?",
                (number, alias),
            )
            found[name] = previous
    if faults:
        raise AdapterError(gather("cannot roll back, so nothing was changed:", faults))
    return found


def drop_alias(link: Link, namespace: str, name: str, alias: str) -> None:
    """Take an alias away."""
    number = take_name(link, namespace, name)
    if not link.run("DELETE FROM kilotune_aliases WHERE name = ? AND alias = ?", (number, alias)):
        raise missing(link, namespace, name, alias)


# -- rm --------------------------------------------------------------------------------------------


def remove(link: Link, namespace: str, name: str, which: int | str | None, every: bool, force: bool) -> int:
    """Remove a version, or every one; how many that were."""
    take_name(link, namespace, name)
    rows = (
        of_names(link, namespace, [name], every=True, data=False)
        if every
        else [find(link, namespace, name, which, data=False)]
    )
    if not rows:
        raise missing(link, namespace, name, None)
    named = [] if every or force else aliases_of(link, namespace, name)
    if holding := [alias for alias, version, _ in named if version == rows[0].version]:
        raise AdapterError(
            f"{name!r}: version {rows[0].version} is named by {', '.join(map(repr, holding))}; move the alias first, "
            "or remove it with force"
        )
    if not force and (others := stacks.standing(link, namespace, rows, whole=every)):
        what = f"version {rows[0].version}" if len(rows) == 1 else "a version"
        raise AdapterError(
            f"{name!r}: {others} stand on {what} of it, and would answer no more; remove them first, or this one with "
            "force"
        )
    drop(link, namespace, rows)
    return len(rows)


def drop(link: Link, namespace: str, rows: Sequence[Row]) -> None:
    """Take versions away, with all that refers to them; their names stay taken."""
    keys = [(row.name_id, row.version) for row in rows]
    link.many("DELETE FROM kilotune_aliases WHERE name = ? AND version = ?", keys)
    link.many("UPDATE kilotune_aliases SET previous = NULL WHERE name = ? AND previous = ?", keys)
    link.many(
        "DELETE FROM kilotune_tags WHERE namespace = (SELECT s.id FROM kilotune_namespaces s WHERE s.name = ?) "
        "AND tag = ? AND name = ? AND version = ?",
        [(namespace, tag, row.name, row.version) for row in rows for tag in json.loads(row.tags)],
    )
    link.many("DELETE FROM kilotune_versions WHERE name = ? AND version = ?", keys)
    link.many("DELETE FROM kilotune_payloads WHERE id = ?", [(row.payload,) for row in rows])


def purge(link: Link, namespace: str, names: Sequence[str]) -> int:
    """Remove every version of these names, by force, and the names; how many versions. What is not there is none.

    A name stays, without a version, where a version of another one says that it stands on it.
    """
    count = 0
    for name in names:
        row = link.one(
            "SELECT n.id FROM kilotune_names n WHERE n.name = ? AND n.namespace = "
            f"(SELECT s.id FROM kilotune_namespaces s WHERE s.name = ?){link.locking}",
            (name, namespace),
        )
        if row is None:
            continue
        rows = of_names(link, namespace, [name], every=True, data=False)
        drop(link, namespace, rows)
        count += len(rows)
        stood_on = "EXISTS (SELECT 1 FROM kilotune_versions v WHERE v.shared_name = kilotune_names.id)"
        link.run(f"DELETE FROM kilotune_names WHERE id = ? AND NOT {stood_on}", (row[0],))
    return count


def note_used(link: Link, times: Mapping[tuple[int, int], int]) -> None:
    """Write down when versions were read: by the name's number and the version."""
    link.many(
        "UPDATE kilotune_versions SET used = ? WHERE name = ? AND version = ? AND (used IS NULL OR used < ?)",
        [(when, name, version, when) for (name, version), when in sorted(times.items())],
    )
