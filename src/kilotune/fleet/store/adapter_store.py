"""What every adapter store does, whatever keeps it: :class:`AdapterStore`.

A handle is bound to one namespace (a tenant), and no argument of any method reaches another one. It may be used from
several threads at once, and after a fork.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from os import PathLike
from types import TracebackType
from typing import Any, Self, final

from torch import Tensor

from ...errors import KilotuneError, StoreLimitError
from ...injection.fingerprint import Fingerprint
from ...model.adapter_model import AdapterModel
from .records import Collected, Contents, Fault, Form, Record, SharedVersion, Standing, Stats, Version

__all__ = ["Adapter", "AdapterStore", "Item", "Which"]

Adapter = str | PathLike[str] | AdapterModel | Contents | Record
Which = int | str | None
ONLY_READ = "is only read, so nothing can be put, moved or removed in it"


@final
@dataclass(frozen=True, eq=False)
class Item:
    """One adapter to put: see :meth:`AdapterStore.put` for what the parts mean."""

    name: str
    adapter: Adapter
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    on: str | SharedVersion | None = None


class AdapterStore(ABC):
    """Adapters by name and version, in one namespace. Open one with :func:`kilotune.fleet.open_store`.

    url: where it is, without a password. namespace: whose adapters these are. read_only: whether writing is refused.
    base: the fingerprint that every adapter must have, or None.

    *Which* version is meant: a number; an alias; or None for the newest.

    Raises (every method):
        StoreError: the store cannot be read or written, is busy for too long, damaged, closed, or read-only.
        AdapterError: no such adapter, version or alias (with the nearest name), or a name that cannot be one.
    """

    url: str
    namespace: str
    read_only: bool
    base: Fingerprint | None

    def check_writable(self) -> None:
        """Refuse a store that is only read, before anything is worked out for it.

        Raises:
            StoreLimitError: it is.

        """
        if self.read_only:
            raise StoreLimitError(f"{self.url} was opened read-only, so nothing can be changed in it", ONLY_READ)

    # -- one adapter -----------------------------------------------------------------------------

    @abstractmethod
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
        """Keep an adapter as the newest version of ``name``; once this returns, it is on disk.

        Args:
            name: at most 200 bytes, no slash, no control character, none that turns a line about; kept in Unicode's
                form NFC (see :meth:`name_for`).
            adapter: a folder with PEFT's two files, a kilotune model, or what another store gave.
            metadata: anything that JSON can say, at most 64 KiB.
            tags: short words to find it by.
            alias: a word that names this version from now on (see :meth:`alias`), moved in the same instant.
            packing: "float32" (every bit as it is), "bfloat16" or "int8"; the store's own by default.
            adapter_name: which adapter of a model; its active one by default.
            on: the shared adapter that it was trained on top of: NAME (its newest version), NAME/3 or NAME/alias, of
                this namespace, or where that has no such name, of :data:`~.names.SHARED`; or what :meth:`settle` gave.
                The version is settled now, by its contents: it stays what the adapter stands on, wherever aliases go.

        Raises:
            AdapterError, ConfigError: ``on`` is not there, stands on another one itself, or is missing for an adapter
                whose file says that it was trained on top of one.
            CheckpointError: the adapter's files are damaged, its base is not the store's, or it cannot be packed so.

        """

    @abstractmethod
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
        """As :meth:`put`, but where the newest version is the same, that is the version; so it can be done again.

        The same: adapter (its form and its packed numbers, bit for bit), metadata and tags. Newest is what is so in the
        transaction that writes: of several who put the same at once, in whatever thread or process, one makes the
        version and the others get it. What another put made newest meanwhile is followed by a new version; with
        ``first`` it is given, whatever it is, and there is one version.

        Returns:
            (the version, whether it was made now); ``alias`` names it either way.

        """

    @abstractmethod
    def name_for(self, name: str) -> str:
        """The name under which :meth:`put` keeps an adapter: in Unicode's form NFC, or as the store has it already.

        Raises:
            AdapterError: it cannot be a new name, or the store has it in the characters of another form.

        """

    @abstractmethod
    def get(self, name: str, version: Which = None) -> Record:
        """One adapter, whole and verified against its hash.

        Raises:
            CheckpointError: it is damaged, or is of another base than the store was opened with.

        """

    def vectors(self, name: str, version: Which = None) -> tuple[Form, Tensor]:
        """(its form, its numbers as one float32 row): what a bank stacks. See :meth:`Record.vector`."""
        record = self.get(name, version)
        return record.form, record.vector()

    @abstractmethod
    def info(self, name: str, version: Which = None) -> Version:
        """One version without its numbers."""

    @abstractmethod
    def versions(self, name: str) -> list[Version]:
        """All versions of an adapter, the oldest first; empty where there is none of this name."""

    @abstractmethod
    def settle(self, on: str | SharedVersion) -> SharedVersion:
        """Which version ``on`` of :meth:`put` means now; raises as :meth:`find_shared`."""

    @abstractmethod
    def find_shared(self, on: str | SharedVersion) -> Record:
        """What ``on`` of :meth:`put` means now: the shared adapter, whole and verified against its hash.

        Raises:
            AdapterError: there is none. ConfigError: it stands on another one itself.

        """

    @abstractmethod
    def shared_of(self, version: Version) -> Record:
        """The shared adapter that a version stands on, whole and verified against its hash.

        Raises:
            AdapterError: the version stands on none, or that one was removed by force. CheckpointError: it is damaged.

        """

    @abstractmethod
    def standing_on(self, name: str, version: Which = None) -> Standing:
        """Who stands on a version; only names of this namespace are told."""

    @abstractmethod
    def rm(self, name: str, version: Which = None, *, force: bool = False) -> int:
        """Remove one version, or with None all of them and the aliases; returns how many versions that were.

        Args:
            version: a number, an alias, or "latest".
            force: remove a version that an alias names, and the alias with it; and one that others stand on, which
                then answer no more. Else that is an AdapterError.

        The numbers of removed versions are not given again.
        """

    # -- aliases ---------------------------------------------------------------------------------

    @abstractmethod
    def alias(self, name: str, alias: str, version: Which = None, *, expected: int | None = None) -> int:
        """Let ``alias`` name a version of ``name``; returns its number. Readers see the old one or the new one.

        Args:
            expected: only if the alias names this version now (0: if there is no such alias); else an AdapterError,
                and nothing is changed.

        """

    @abstractmethod
    def roll_out(self, alias: str, versions: Mapping[str, Which]) -> dict[str, int]:
        """Move an alias for many adapters at once, all or none; returns the versions by name."""

    @abstractmethod
    def roll_back(self, alias: str, names: Iterable[str]) -> dict[str, int]:
        """Let an alias name what it named before its last move, for each of ``names``, all or none.

        Rolling back twice is where it began.
        """

    @abstractmethod
    def unalias(self, name: str, alias: str) -> None:
        """Take an alias away; the version that it named stays."""

    @abstractmethod
    def aliases(self, name: str) -> dict[str, int]:
        """The version that each alias of an adapter names."""

    # -- many ------------------------------------------------------------------------------------

    @abstractmethod
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
        """Keep many adapters, read from ``items`` as they are needed; returns how many.

        Args:
            items: what to put; a name may come several times. What their ``on`` means is settled once for all.
            alias, packing: as in :meth:`put`, for all of them.
            batch: how many become visible together. What was acknowledged stays when a later one fails.
            done: is told the versions of a batch once it is on disk.
            failed: is told of an adapter that is not fit to be put, which is then left out.

        Raises:
            CheckpointError, AdapterError, ConfigError: without ``failed``: one of them is not fit; none of its batch is
                kept.

        """

    @abstractmethod
    def get_many(self, names: Iterable[str], version: Which = None) -> Iterator[Record]:
        """The adapters of these names in their order, read in batches.

        Raises:
            AdapterError: some are not there; all of a batch that are missing are named.

        """

    @abstractmethod
    def names(self, pattern: str | None = None) -> Iterator[str]:
        """The names that there are, in their order; ``pattern`` as in :meth:`ls`."""

    @abstractmethod
    def ls(
        self,
        pattern: str | None = None,
        *,
        tags: Sequence[str] = (),
        versions: bool = False,
        after: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Version]:
        """What is there, by name: the newest version of each adapter, or with ``versions`` every one.

        Args:
            pattern: a name, in which ``*``, ``?`` and ``[...]`` stand for others, as in a shell.
            tags: only versions that have all of these.
            after: begin behind this name.
            limit: at most so many.

        It is read in pieces, so that it takes no memory and holds nobody up; what is written meanwhile may be seen.
        """

    # -- upkeep ----------------------------------------------------------------------------------

    @abstractmethod
    def verify(self, names: Iterable[str] | None = None) -> Iterator[Fault]:
        """Read every version (of ``names``, or all) and hold it against its hash; what is wrong, as it is found."""

    @abstractmethod
    def stats(self) -> Stats:
        """The namespace in numbers."""

    @abstractmethod
    def gc(
        self,
        *,
        keep: int | None = None,
        unused_for: timedelta | None = None,
        compact: bool = False,
        dry_run: bool = False,
    ) -> Collected:
        """Remove old versions, and what nobody uses any more.

        Args:
            keep: leave this many of the newest versions of each adapter, and all that an alias names or named
                before its last move, and all that others stand on; None: remove no version.
            unused_for: of those, only what nobody has read (or put) for so long.
            compact: give the space back to the file system, which takes the store to itself for a while; without it
                the space serves what is put next.
            dry_run: only say what would go.

        """

    @abstractmethod
    def close(self) -> None:
        """Note when what was read was read, and let go of files and connections. A closed store refuses all else."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
