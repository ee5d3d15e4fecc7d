"""Out of the tables: which version is meant, rows as records, and the forms that many rows share.

Whatever is asked for, the namespace is part of the statement, as a value and never as a part of its text.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ...adapter_files.stands_on import stored_of
from ...errors import AdapterError, CheckpointError, did_you_mean
from ...injection.fingerprint import Fingerprint
from .names import NEWEST
from .packing import Layout
from .records import Form, KeptFiles, Record, SharedVersion, Version, check_frozen
from .schema import Link

__all__ = ["Forms", "Known", "Row", "find", "kept_data", "missing", "names_after", "of_names", "unpacked_text"]

Below = tuple[int | None, int | None, str | None, str | None, int | None]
NOTHING: Below = (None, None, None, None, None)
OWN = 11  # columns of a version's own
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_TEXT = 200_000_000  # bytes of a form or a fingerprint, unpacked; a damaged or hostile store could claim any size
LAST = "\U0010ffff"  # sorts behind every character
FORMS_KEPT = 64
COLUMNS = "n.id, n.name, v.version, v.form, v.payload, v.size, v.created, v.used, v.sha256, v.metadata, v.tags"
TABLES = (
    "FROM kilotune_namespaces s JOIN kilotune_names n ON n.namespace = s.id JOIN kilotune_versions v ON v.name = n.id"
)
WITH_DATA = "LEFT JOIN kilotune_payloads p ON p.id = v.payload"
SHARED = "v.shared_name, v.shared_version, sn.name, ss.name, sv.version"
WITH_SHARED = (
    "LEFT JOIN kilotune_names sn ON sn.id = v.shared_name LEFT JOIN kilotune_namespaces ss ON ss.id = sn.namespace "
    "LEFT JOIN kilotune_versions sv ON sv.name = v.shared_name AND sv.version = v.shared_version"
)
IS_NEWEST = "v.version = (SELECT MAX(w.version) FROM kilotune_versions w WHERE w.name = n.id)"
HAS_ALIAS = "v.version = (SELECT a.version FROM kilotune_aliases a WHERE a.name = n.id AND a.alias = ?)"


@final
@dataclass(frozen=True)
class Row:
    """A row of ``versions`` with its name; data: the packed numbers, None where nobody asked or they are not there.

    below: what it stands on: the number of its name, its version, its name, its namespace, and its version again where
    that is there still; or None five times.
    """

    name_id: int
    name: str
    version: int
    form: int
    payload: int
    size: int
    created: int
    used: int | None
    sha256: bytes
    metadata: str
    tags: str
    below: Below = NOTHING
    data: bytes | None = None

    @classmethod
    def of(cls, values: Sequence[Any]) -> Row:
        """Of the columns that :func:`_select` asks for."""
        own: tuple[Any, ...] = tuple(values)
        data = own[OWN + len(NOTHING) :]  # none where nobody asked
        below = own[OWN : OWN + len(NOTHING)]
        return cls(*(*own[:OWN], below, *data))

    def stands_on(self, form: Form) -> SharedVersion | None:
        """What it stands on: where, by its row; which contents, by its form.

        Raises:
            CheckpointError: one of them says so and the other does not.

        """
        _, version, name, namespace, there = self.below
        sha256 = stored_of(form.header)
        if sha256 is None and version is None:
            return None
        if sha256 is None or version is None or name is None or namespace is None:
            raise CheckpointError(f"{self.name!r} (version {self.version}) is damaged: what it stands on is not known")
        return SharedVersion(name, int(version), sha256, namespace, removed=there is None)

    def info(self, form: Form) -> Version:
        """As callers see it."""
        return Version(
            name=self.name,
            version=self.version,
            sha256=bytes(self.sha256).hex(),
            created=moment(self.created),
            used=None if self.used is None else moment(self.used),
            metadata=json.loads(self.metadata),
            tags=tuple(json.loads(self.tags)),
            packing=form.layout.packing,
            size=self.size,
            form=form.sha256,
            base=None if form.base is None else form.base.sha256,
            stands_on=self.stands_on(form),
            files=dict(form.files),
        )

    def record(self, known: Known) -> Record:
        """The whole adapter, held against its hash.

        Raises:
            CheckpointError: it is damaged.

        """
        data = None if self.data is None else bytes(self.data)
        where = f"{self.name!r} (version {self.version})"
        if data is None:
            raise CheckpointError(f"{where} is damaged: its numbers are not there")
        if known.form.content_hash(data) != bytes(self.sha256):
            raise CheckpointError(f"{where} is damaged: its SHA-256 is not {bytes(self.sha256).hex()}")
        known.form.layout.check(data)
        return Record(self.info(known.form), known.form, data, known.frozen, known.files)


def moment(microseconds: int) -> datetime:
    """A time of the store, which counts microseconds from 1970, as UTC."""
    return EPOCH + timedelta(microseconds=microseconds)


# -- which -----------------------------------------------------------------------------------------


def _clause(which: int | str | None) -> tuple[str, tuple[Any, ...]]:
    if which is None:
        return IS_NEWEST, ()
    return ("v.version = ?", (which,)) if isinstance(which, int) else (HAS_ALIAS, (which,))


def _select(link: Link, data: bool) -> str:
    """The columns of a :class:`Row`, and the tables that they are in."""
    shared, tables = (SHARED, WITH_SHARED) if link.stacks else (", ".join(["NULL"] * len(NOTHING)), "")
    payload, payloads = (", p.data", WITH_DATA) if data else ("", "")
    return f"SELECT {COLUMNS}, {shared}{payload} {TABLES} {payloads} {tables}"


def find(link: Link, namespace: str, name: str, which: int | str | None, data: bool) -> Row:
    """One version. Raises AdapterError where it is not there."""
    clause, values = _clause(which)
    sql = f"{_select(link, data)} WHERE s.name = ? AND n.name = ? AND {clause}"
    row = link.one(sql, (namespace, name, *values))
    if row is None:
        raise missing(link, namespace, name, which)
    return Row.of(row)


def of_names(
    link: Link, namespace: str, names: Sequence[str], which: int | str | None = None, *, every: bool, data: bool
) -> list[Row]:
    """The version of each name that is meant, or every one, by name and version; what is not there is left out."""
    clause, values = ("1 = 1", ()) if every else _clause(which)
    places = ", ".join("?" * len(names))
    found = link.rows(
        f"{_select(link, data)} WHERE s.name = ? AND n.name IN ({places}) AND {clause} ORDER BY n.name, v.version",
        (namespace, *names, *values),
    )
    return [Row.of(row) for row in found]


def names_after(
    link: Link, namespace: str, after: str, prefix: str = "", tag: str | None = None, count: int = 500
) -> list[str]:
    """The next names behind ``after`` that begin with ``prefix``, in order."""
    table, clause = "kilotune_tags", "AND t.tag = ?"
    if tag is None:  # a name stays when its last version is removed
        table, clause = "kilotune_names", "AND EXISTS (SELECT 1 FROM kilotune_versions v WHERE v.name = t.id)"
    more = () if tag is None else (tag,)
    found = link.rows(
        f"SELECT DISTINCT t.name FROM {table} t JOIN kilotune_namespaces s ON s.id = t.namespace "
        f"WHERE s.name = ? {clause} AND t.name > ? AND t.name >= ? AND t.name < ? ORDER BY t.name LIMIT ?",
        (namespace, *more, after, prefix, prefix + LAST, count),
    )
    return [name for (name,) in found]


def which_are_there(link: Link, namespace: str, names: Sequence[str]) -> set[str]:
    """Those of these names that an adapter has."""
    places = ", ".join("?" * len(names))
    found = link.rows(
        "SELECT n.name FROM kilotune_names n JOIN kilotune_namespaces s ON s.id = n.namespace "
        f"WHERE s.name = ? AND n.name IN ({places}) AND EXISTS (SELECT 1 FROM kilotune_versions v WHERE v.name = n.id)",
        (namespace, *names),
    )
    return {name for (name,) in found}


def missing(link: Link, namespace: str, name: str, which: int | str | None) -> AdapterError:
    """What to tell who asked for something that is not there; only this namespace is looked at."""
    numbers = [row.version for row in of_names(link, namespace, [name], every=True, data=False)]
    if not numbers:
        near = names_after(link, namespace, "", name[:1], count=200) or names_after(link, namespace, "", count=200)
        return AdapterError(f"there is no adapter {name!r} in this namespace.{did_you_mean(name, near)}")
    shown = ", ".join(map(str, numbers[-10:]))
    if not isinstance(which, str):
        return AdapterError(f"{name!r} has no version {which or NEWEST}; it has {shown}")
    there = [alias for alias, _, _ in aliases_of(link, namespace, name)]
    have = f"aliases: {', '.join(map(repr, there))}" if there else f"no aliases, but versions: {shown}"
    return AdapterError(f"{name!r} has no alias {which!r}.{did_you_mean(which, there)} It has {have}")


def aliases_of(link: Link, namespace: str, name: str) -> list[tuple[str, int, int | None]]:
    """(alias, the version that it names, the one before) of an adapter."""
    found = link.rows(
        "SELECT a.alias, a.version, a.previous FROM kilotune_namespaces s JOIN kilotune_names n ON n.namespace = s.id "
        "JOIN kilotune_aliases a ON a.name = n.id WHERE s.name = ? AND n.name = ? ORDER BY a.alias",
        (namespace, name),
    )
    return [(alias, version, previous) for alias, version, previous in found]


# -- forms -----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, eq=False)
class Known:
    """A form with its frozen tensors and files."""

    form: Form
    frozen: Mapping[str, Tensor]
    files: Mapping[str, bytes]


@final
class Forms:
    """The forms that were used last, by their number in the store."""

    def __init__(self, fetch: Callable[[str, str], bytes]) -> None:
        """fetch: (name, SHA-256) -> a file of a form, as the store has it."""
        self._fetch = fetch
        self._known: OrderedDict[int, Known] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, link: Link, number: int) -> Known:
        """A form, read at most once.

        Raises:
            CheckpointError: it is damaged.

        """
        with self._lock:
            if (known := self._known.get(number)) is not None:
                self._known.move_to_end(number)
                return known
        known = read_form(link, number, self._fetch)
        with self._lock:
            self._known[number] = known
            if len(self._known) > FORMS_KEPT:
                self._known.popitem(last=False)
        return known


def read_form(link: Link, number: int, fetch: Callable[[str, str], bytes]) -> Known:
    """A form out of its tables, held against its hash. fetch: gives its files, when somebody reads them."""
    row = link.one(
        "SELECT f.sha256, f.data, b.data FROM kilotune_forms f LEFT JOIN kilotune_bases b ON b.id = f.base "
        "WHERE f.id = ?",
        (number,),
    )
    if row is None:
        raise CheckpointError(f"the store is damaged: form {number} is not there")
    sha256, data, base = bytes(row[0]).hex(), bytes(row[1]), row[2]
    try:
        values = json.loads(unpacked_text(data))
        fingerprint = None if base is None else Fingerprint.from_json(unpacked_text(bytes(base)))
        layout = Layout.from_json(values["layout"])
        form = Form(values["config"], values["header"], layout, values["shared"], fingerprint, values.get("files", {}))
        actual = form.sha256
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the store is damaged: form {number} cannot be read: {error}") from error
    if actual != sha256:
        raise CheckpointError(f"the store is damaged: form {number}: expected SHA-256 {sha256}, got {actual}")
    frozen = {key: _frozen(link, key, wanted) for key, wanted in form.shared.items()}
    return Known(form, frozen, KeptFiles(form.files, fetch))


def kept_data(link: Link, what: str, sha256: str) -> bytes:
    """What is kept under a hash, once for all that have it; CheckpointError where it is not there."""
    row = link.one("SELECT data FROM kilotune_frozen WHERE sha256 = ?", (bytes.fromhex(sha256),))
    if row is None:
        raise CheckpointError(f"the store is damaged: {what} is not there")
    return bytes(row[0])


def _frozen(link: Link, key: str, sha256: str) -> Tensor:
    data = kept_data(link, f"the shared tensor {key}", sha256)
    try:
        tensor = load(data)[""]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"the store is damaged: the shared tensor {key} cannot be read: {error}") from error
    check_frozen(key, tensor, sha256)
    return tensor


def unpacked_text(data: bytes) -> str:
    """What :func:`zlib.compress` made of a text; ValueError where it did not."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, MAX_TEXT)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if unpacker.unconsumed_tail or not unpacker.eof:
        raise ValueError("it is cut off, or larger than any of its kind")
    return text.decode()
