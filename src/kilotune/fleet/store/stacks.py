"""Personal adapters on top of shared ones, in the tables: what an ``on`` means, and who stands on a version.

::

    kilotune_versions.shared_name, shared_version    where the shared version is
    the form's header (adapter_files/stands_on.py)   which contents it has; so it is part of the personal one's hash

A version can stand on one of its own namespace, or of :data:`~.names.SHARED`, and on none of any other.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence

from ...adapter_files.content import content_sha256
from ...adapter_files.peft_layout import BASE
from ...errors import AdapterError, CheckpointError, ConfigError, did_you_mean
from .names import SHARED, check_on, spellings
from .preparing import Below
from .reading import Forms, Row, find, names_after, which_are_there
from .records import Record, SharedVersion, Standing, Version
from .schema import Link

__all__ = ["below", "find_shared", "hold", "record_below", "standing", "stood_on", "stood_on_faults"]

SHOWN = 5  # names in a message


def below(
    link: Link, forms: Forms, contents: MutableMapping[str, str], namespace: str, on: str | SharedVersion
) -> Below:
    """What ``on`` means for a personal adapter of ``namespace``.

    Args:
        link: in a transaction.
        forms: those that are known.
        contents: :func:`content_sha256` by the store's own hash, of what was looked at before.
        namespace: of the personal adapter, which is looked through first.
        on: the shared adapter: NAME, NAME/3, NAME/alias, or a version that was settled before.

    Raises:
        AdapterError: there is none. ConfigError: it stands on another one itself. CheckpointError: it is damaged.

    """
    row, record, place = find_shared(link, forms, namespace, on)
    if place.sha256 not in contents:
        contents[place.sha256] = content_sha256(record.file())
    exact, form = record.info.packing == "float32", record.form
    known = form.base, form.header.get(BASE), form.saved_whole
    return Below(row.name_id, place, contents[place.sha256], exact, *known)


def find_shared(link: Link, forms: Forms, namespace: str, on: str | SharedVersion) -> tuple[Row, Record, SharedVersion]:
    """(its row, the adapter, where it is) of what ``on`` means; raises as :func:`below`."""
    which: int | str | None
    if isinstance(on, SharedVersion):
        space, name, which = on.namespace, on.name, on.version
        if space not in (namespace, SHARED):
            raise AdapterError(f"on={name!r}: is of the namespace {space!r}, and neither of this one nor of {SHARED!r}")
    else:
        name, which = check_on(on)
        space, name = _space_of(link, namespace, name)
    row = find(link, space, name, which, data=True)
    record = row.record(forms.of(link, row.form))
    info = record.info
    if isinstance(on, SharedVersion) and info.sha256 != on.sha256:
        raise AdapterError(f"on={name!r}: version {info.version} has other contents than when it was settled")
    if info.stands_on is not None:
        raise ConfigError(
            f"on={name!r}: version {info.version} stands on {info.stands_on} itself, and a stack has two levels: a "
            "shared adapter and a personal one on top; train on the shared one"
        )
    return row, record, SharedVersion(info.name, info.version, info.sha256, space)


def _space_of(link: Link, namespace: str, name: str) -> tuple[str, str]:
    """(the namespace that has an adapter of this name, the name as it is there)."""
    for space in dict.fromkeys((namespace, SHARED)):
        if there := which_are_there(link, space, spellings(name)):
            return space, name if name in there else min(there)
    near = [one for space in (namespace, SHARED) for one in names_after(link, space, "", count=200)]
    short = name.partition("@")[0]
    hint = f" A version is written {short}/3." if short in near else did_you_mean(name, near)
    raise AdapterError(f"on={name!r}: there is no such adapter in this namespace, nor in {SHARED!r}.{hint}")


def hold(link: Link, places: Iterable[Below]) -> None:
    """See that versions are there still, and keep them so until the transaction ends.

    Raises:
        AdapterError: one was removed meanwhile.

    """
    for number, version, one in sorted({(p.number, p.place.version, p.place) for p in places}, key=lambda k: k[:2]):
        link.rows(f"SELECT id FROM kilotune_names WHERE id = ?{link.sharing}", (number,))
        found = link.one("SELECT sha256 FROM kilotune_versions WHERE name = ? AND version = ?", (number, version))
        if found is None or bytes(found[0]).hex() != one.sha256:
            raise AdapterError(f"on={one.name!r}: version {version} was removed meanwhile; nothing was written")


def record_below(link: Link, forms: Forms, namespace: str, version: Version) -> Record:
    """The shared adapter that a version of ``namespace`` stands on, held against its hash.

    Raises:
        AdapterError: it was removed. CheckpointError: it is damaged, or other contents are in its place.

    """
    on = version.stands_on
    if on is None:
        raise AdapterError(f"{version.name!r} (version {version.version}) stands on no other adapter")
    if on.namespace not in (namespace, SHARED):
        raise AdapterError(f"{version.name!r} (version {version.version}) is of another namespace than {namespace!r}")
    try:
        row = find(link, on.namespace, on.name, on.version, data=True)
    except AdapterError:
        raise AdapterError(
            f"{version.name!r} (version {version.version}) stands on {on}, which was removed; put that adapter again "
            f"and {version.name!r} on top of it"
        ) from None
    record = row.record(forms.of(link, row.form))
    if record.info.sha256 != on.sha256:
        raise CheckpointError(
            f"{version.name!r} (version {version.version}) is damaged: {on} has other contents than what it stands on"
        )
    return record


def standing(link: Link, namespace: str, rows: Sequence[Row], whole: bool = False) -> Standing:
    """Who stands on these versions of one name. whole: they are all that there are of it, and go together."""
    if not rows or not link.stacks:
        return Standing((), 0, 0)
    number, places = rows[0].name_id, ", ".join("?" * len(rows))
    tables = (
        "FROM kilotune_versions v JOIN kilotune_names n ON n.id = v.name JOIN kilotune_namespaces s "
        f"ON s.id = n.namespace WHERE v.shared_name = ? AND v.shared_version IN ({places})"
        f"{' AND v.name <> ?' if whole else ''}"
    )
    values = (number, *(row.version for row in rows), *([number] if whole else []))
    counts = link.rows(f"SELECT s.name, COUNT(DISTINCT v.name) {tables} GROUP BY s.name", values)
    own = sum(int(count) for space, count in counts if space == namespace)
    names = link.rows(
        f"SELECT DISTINCT n.name {tables} AND s.name = ? ORDER BY n.name LIMIT ?", (*values, namespace, SHOWN)
    )
    return Standing(tuple(name for (name,) in names), own, sum(int(count) for _, count in counts) - own)


def stood_on(link: Link, numbers: Sequence[int]) -> set[tuple[int, int]]:
    """(number of the name, version) of all versions of these names that others stand on."""
    if not numbers or not link.stacks:
        return set()
    places = ", ".join("?" * len(numbers))
    found = link.rows(
        f"SELECT DISTINCT v.shared_name, v.shared_version FROM kilotune_versions v WHERE v.shared_name IN ({places})",
        tuple(numbers),
    )
    return {(int(name), int(version)) for name, version in found}


def stood_on_faults(link: Link, forms: Forms, rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Of versions, those whose shared one is not there, or is another one; with what is wrong."""
    known: dict[tuple[int | None, int | None], str | None] = {}
    faults = []
    for row in rows:
        number, version, name, *_ = row.below
        if number is None:
            continue
        if (number, version) not in known:
            found = link.one("SELECT sha256 FROM kilotune_versions WHERE name = ? AND version = ?", (number, version))
            known[number, version] = None if found is None else bytes(found[0]).hex()
        there = known[number, version]
        try:
            on = row.stands_on(forms.of(link, row.form).form)
        except CheckpointError:
            continue  # told where the row itself is read
        if on is not None and there != on.sha256:
            what = "was removed" if there is None else "has other contents"
            faults.append((row, f"stands on {name!r} (version {version}), which {what}"))
    return faults
