"""What goes into a store and what comes out: contents, forms, versions, records. Plain data, no database.

An adapter is its ``adapter_config.json`` and its tensors. Among thousands of users the configuration, the names and
shapes of the tensors and the base are the same, and only the numbers differ. What is the same is a :class:`Form`,
kept once; what differs is one flat row of bytes (packing.py).
"""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, final

from torch import Tensor

from ...adapter_files.files import TwoFiles, tensors_checksum, write
from ...adapter_files.own_files import OWN_FILES, digest
from ...adapter_files.reading import AdapterFile, parse
from ...adapter_files.stands_on import StandsOn, with_mark
from ...errors import CheckpointError
from ...injection.fingerprint import Fingerprint
from ...injection.targets import HEADS
from .packing import Layout

__all__ = [
    "SUM",
    "Collected",
    "Contents",
    "Fault",
    "Fingerprint",
    "Form",
    "KeptFiles",
    "Moved",
    "Record",
    "SharedVersion",
    "Standing",
    "Stats",
    "Version",
    "canonical",
    "saved_whole",
    "unpacked_file",
]

LAST = 2**26  # bytes of the files that were read last, of all stores
SUM = "kilotune_sha256"  # the one value of a file's header that differs between adapters of one form


def canonical(value: Any) -> str:
    """One text for equal values: JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


@final
@dataclass(frozen=True, eq=False)
class Contents:
    """An adapter on its way into a store: what its two files say, wherever it came from.

    config: the object of adapter_config.json. tensors: under the file's own keys (``base_model.model....``).
    header: the metadata of adapter_model.safetensors. base: the model that it was trained on, where that is known.
    where: what errors call it. files: what it brings beside them, by name (adapter_files/own_files.py).
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    base: Fingerprint | None = None
    where: Path = Path("the adapter")
    files: Mapping[str, bytes] = field(default_factory=dict)

    @cached_property
    def file(self) -> AdapterFile:
        """The adapter in them, checked; made once, however often it is asked for.

        Raises:
            CheckpointError, ConfigError: they are no adapter.

        """
        return parse(TwoFiles(self.where, self.config, self.tensors, self.header))


def saved_whole(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of modules that an adapter of this adapter_config.json brings itself, such as a head."""
    named = config.get("modules_to_save") or ()
    heads = HEADS.get(str(config.get("task_type")), ())
    return (*((named,) if isinstance(named, str) else named), *heads)


@final
@dataclass(frozen=True, eq=False)
class Form:
    """What adapters of one kind have in common; kept once in a store, however many there are.

    config: of adapter_config.json. header: of the weights' file, without the checksum of the numbers. layout: keys,
    shapes, types and packing of the numbers. shared: SHA-256 (hexadecimal) by key of the frozen tensors that all have.
    base: the fingerprint of the base model, or None where it is not known. files: SHA-256 (hexadecimal) by name of what
    the adapters bring beside their two files: a chat template, a tokenizer.
    """

    config: Mapping[str, Any]
    header: Mapping[str, str]
    layout: Layout
    shared: Mapping[str, str] = field(default_factory=dict)
    base: Fingerprint | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def text(self) -> str:
        """The form as one JSON text, the base by its hash."""
        base = None if self.base is None else self.base.sha256
        parts = {"config": dict(self.config), "header": dict(self.header), "layout": self.layout.to_json()}
        files = {"files": dict(self.files)} if self.files else {}  # no key, so that other forms are what they were
        return canonical({**parts, **files, "shared": dict(self.shared), "base": base})

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of :attr:`text`, hexadecimal: equal for equal forms, in any store."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def saved_whole(self) -> tuple[str, ...]:
        """The names of modules that the adapter brings itself, such as a head; the base's own do not matter."""
        return saved_whole(self.config)

    def content_hash(self, packed: bytes) -> bytes:
        """SHA-256 (32 bytes) over the form and the packed numbers: what a version's ``sha256`` says."""
        return hashlib.sha256(bytes.fromhex(self.sha256) + packed).digest()


@final
@dataclass(frozen=True)
class SharedVersion:
    """The shared version below a personal one. sha256: of its contents, which is what it is known by (in a folder,
    which has no versions: :func:`kilotune.adapter_files.content.content_sha256`).

    name, version: where it was when the personal one was put, and is, unless it was removed by force. namespace: its
    own, which is that of the personal one or :data:`~kilotune.fleet.store.names.SHARED`. removed: by force, since; what
    stands on it answers no more.
    """

    name: str
    version: int
    sha256: str
    namespace: str
    removed: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name!r} (version {self.version})"


@final
@dataclass(frozen=True)
class Standing:
    """The adapters that stand on a version. names: the first few, of its own namespace. count: how many there are in
    it; elsewhere: in others, which are not named."""

    names: tuple[str, ...]
    count: int
    elsewhere: int

    def __bool__(self) -> bool:
        return self.count + self.elsewhere > 0

    def __str__(self) -> str:
        names = ", ".join(map(repr, self.names)) + (" ..." if self.count > len(self.names) else "")
        own, others = (f"{n:,} adapter{'s' * (n != 1)}" for n in (self.count, self.elsewhere))
        parts = [f"{own} ({names})"] if self.count else []
        return " and ".join(parts + ([f"{others} of other namespaces"] if self.elsewhere else []))


@final
@dataclass(frozen=True)
class Version:
    """One version of an adapter, without its numbers.

    name, version: its key within the namespace; versions count from 1 and a number is never given twice. sha256: of
    the form and the packed numbers, hexadecimal. created, used: UTC; used is None until the first read, and exact to
    a minute or so (reads are noted together). metadata, tags: what was given when it was put. packing: "float32",
    "bfloat16" or "int8". size: bytes of the packed numbers. form: SHA-256 of its :class:`Form`. base: SHA-256 of the
    base model's fingerprint, or None. stands_on: the shared version that it was trained on top of, or None. files: what
    it brings beside its two files, with SHA-256.
    """

    name: str
    version: int
    sha256: str
    created: datetime
    used: datetime | None
    metadata: Mapping[str, Any]
    tags: tuple[str, ...]
    packing: str
    size: int
    form: str
    base: str | None
    stands_on: SharedVersion | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> str | None:
        """One SHA-256 for what it brings beside its two files; None where that is nothing."""
        return digest(self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        times = {"created": self.created.isoformat(), "used": None if self.used is None else self.used.isoformat()}
        below = None if self.stands_on is None else dict(self.stands_on.__dict__)
        own = {"metadata": dict(self.metadata), "tags": list(self.tags), "stands_on": below, "files": dict(self.files)}
        return {**self.__dict__, **times, **own}


@final
@dataclass(frozen=True, eq=False)
class Record:
    """An adapter out of a store, whole: ``model.load_adapter(record.file(), "ann")`` puts it into a model.

    info: its key, times, metadata. form: what it shares with others. packed: its own numbers, as stored.
    frozen: the shared frozen tensors by key (not to be written to). files: what it brings beside its two files.
    """

    info: Version
    form: Form
    packed: bytes = field(repr=False)
    frozen: Mapping[str, Tensor] = field(repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> dict[str, Any]:
        """The object of adapter_config.json, a copy of its own."""
        return copy.deepcopy(dict(self.form.config))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the file's keys, in their dtypes and shapes; new ones at each call.

        From a record packed in float32 they are the very bits that were put.
        """
        return dict(sorted({**self.form.layout.unpack(self.packed), **self.frozen}.items()))

    def vector(self) -> Tensor:
        """All its own numbers as one float32 row (``form.layout.numbers``,), in the order of ``form.layout.entries``.

        Two records of one form have the same order, so rows can be stacked. A new tensor at each call.
        """
        return self.form.layout.vector(self.packed)

    def header(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The metadata for the weights' file, with the checksum of ``tensors``."""
        checksum = {SUM: tensors_checksum(tensors)} if SUM in self.form.header else {}
        return with_mark({**self.form.header, **checksum}, StandsOn.of_header(self.form.header))

    def file(self) -> AdapterFile:
        """The adapter as if it had been read from a folder, checked; what PeftModel and load_adapter take.

        Raises:
            CheckpointError, ConfigError: what is kept is no adapter that this version can read.

        """
        tensors = self.tensors()
        where = Path(f"{self.info.name} (version {self.info.version})")
        return parse(TwoFiles(where, self.config, tensors, self.header(tensors)))

    def save(self, folder: str | Path) -> None:
        """Write PEFT's two files, and what it brings beside them, into ``folder``, whole or not at all."""
        tensors = self.tensors()
        write(Path(folder), self.config, tensors, self.header(tensors), self.files)


@final
class KeptFiles(Mapping[str, bytes]):
    """Files by name that are read from a store when they are asked for, and held against their hashes.

    Args:
        sums: SHA-256 by name.
        fetch: (name, SHA-256) -> the file as the store has it, packed by zlib.

    """

    _last: ClassVar[OrderedDict[str, bytes]] = OrderedDict()  # by SHA-256: many adapters in a row bring the same
    _lock: ClassVar[Lock] = Lock()

    def __init__(self, sums: Mapping[str, str], fetch: Callable[[str, str], bytes]) -> None:
        self._sums, self._fetch = sums, fetch

    def __getitem__(self, name: str) -> bytes:
        sha256 = self._sums[name]
        with self._lock:
            if sha256 in self._last:
                return self._last[sha256]
        data = unpacked_file(name, sha256, self._fetch(name, sha256))
        with self._lock:
            self._last[sha256] = data
            while sum(map(len, self._last.values())) > LAST:
                self._last.popitem(last=False)
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def unpacked_file(name: str, sha256: str, packed: bytes) -> bytes:
    """A file out of a store; CheckpointError where it is not what was kept."""
    try:
        data = zlib.decompressobj().decompress(packed, OWN_FILES.get(name, 1))
    except zlib.error:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"the store is damaged: {name} is not what was kept")
    return data


@final
@dataclass(frozen=True)
class Fault:
    """Something wrong with what a store or a folder holds. version: None where it is not about one."""

    name: str
    version: int | None
    what: str

    def __str__(self) -> str:
        where = self.name if self.version is None else f"{self.name} (version {self.version})"
        return f"{where}: {self.what}"


@final
@dataclass(frozen=True)
class Moved:
    """What a bulk import or export did: how many adapters and bytes of packed numbers, and which failed alone."""

    count: int
    bytes: int
    faults: tuple[Fault, ...] = ()


@final
@dataclass(frozen=True)
class Collected:
    """What gc removed: versions, the bytes of their numbers, and forms, bases and frozen tensors nobody used."""

    versions: int
    bytes: int
    forms: int
    bases: int
    frozen: int


@final
@dataclass(frozen=True)
class Stats:
    """A namespace in numbers.

    names, versions, aliases, forms: how many. packed: bytes of the numbers by packing. metadata_bytes: of names, tags
    and metadata. store_bytes: what the whole store takes on disk, all namespaces together.
    """

    names: int
    versions: int
    aliases: int
    forms: int
    packed: Mapping[str, int]
    metadata_bytes: int
    store_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Numbers and metadata of this namespace."""
        return sum(self.packed.values()) + self.metadata_bytes


def check_frozen(key: str, tensor: Tensor, expected: str) -> None:
    """Hold a shared frozen tensor against the checksum that its form has."""
    if (actual := tensors_checksum({"": tensor})) != expected:
        raise CheckpointError(f"{key}: the shared tensor is damaged: expected SHA-256 {expected}, got {actual}")
