"""Many adapters from one store to another, or out into a folder: one after the other, in little memory.

What is broken fails alone and is reported; the rest goes on. A shared adapter that one of them stands on comes along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, final

from ...adapter_files.content import content_sha256
from ...adapter_files.files import write
from ...adapter_files.names import composed
from ...adapter_files.stands_on import StandsOn, with_mark
from ...errors import AdapterError, CheckpointError, ConfigError, KilotuneError
from .adapter_store import Adapter, AdapterStore, Item, Which
from .names import matches
from .preparing import contents_of
from .records import Fault, Moved, Record, Version

__all__ = ["bring", "copy_adapters", "export_adapters"]

PAGE = 500  # adapters read together
Place = tuple[str, str, int]  # namespace, name, version
ALONE = (AdapterError, CheckpointError, ConfigError)  # what fails alone


def copy_adapters(
    source: AdapterStore,
    target: AdapterStore,
    pattern: str | None = None,
    *,
    version: Which = None,
    history: bool = False,
    alias: str | None = None,
    packing: str | None = None,
    done: Callable[[int], None] | None = None,
) -> Moved:
    """Put adapters of one store (or folder) into another, with their metadata and tags.

    A shared adapter that one of them stands on comes along, whatever ``pattern`` says; where its name means the same
    adapter in the target already (also in :data:`~.names.SHARED`), that one is stood on.

    Args:
        source, target: the stores; the namespaces are those that they were opened with.
        pattern: which names (see :meth:`AdapterStore.ls`); None: all.
        version: which version of each: a number, an alias, or None for the newest.
        history: every version, the oldest first, and the aliases; version numbers are given anew.
        alias: let this alias name what was put.
        packing: how the numbers are kept; None: the target's own way. Rounded numbers do not get better.
        done: is told now and then how many there are so far.

    """
    if history and (version is not None or alias is not None):
        raise ConfigError("history takes every version and its aliases, so it goes with neither version nor alias")
    run = _Run(source, target, packing, alias, done)
    names = filter(run.alone, source.names(pattern))
    if history:
        for name in names:
            run.put_history(name, pattern)
    else:
        run.put(run.records(names, version))
    return Moved(run.count, run.bytes, tuple(run.faults))


def bring(
    target: AdapterStore,
    name: str,
    adapter: Adapter,
    *,
    metadata: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    packing: str | None = None,
) -> str:
    """Have a shared adapter in a store, where it is put unless its name means the same adapter there already.

    Returns:
        What personal ones give as ``on``: NAME/3.

    """
    version, _ = _brought(target, name, adapter, metadata, tags, packing)
    return f"{version.name}/{version.version}"


def _brought(
    target: AdapterStore,
    name: str,
    adapter: Adapter,
    metadata: Mapping[str, Any] | None,
    tags: Sequence[str],
    packing: str | None,
) -> tuple[Version, bool]:
    """(the version in the target, whether it was made now)."""
    contents = contents_of(adapter)
    try:
        found = target.find_shared(name)
    except (AdapterError, ConfigError):
        found = None
    if found is not None and content_sha256(found.file()) == content_sha256(contents.file):
        return found.info, False
    return target.put_once(name, contents, metadata=metadata, tags=tags, packing=packing)


@final
class _There(NamedTuple):
    """A shared adapter in the target. own: it is in the target's own namespace."""

    name: str
    version: int
    own: bool


@final
class _Run:
    """One copy: what was moved so far, and what failed."""

    def __init__(
        self,
        source: AdapterStore,
        target: AdapterStore,
        packing: str | None,
        alias: str | None,
        done: Callable[[int], None] | None,
    ) -> None:
        self.source, self.target, self.packing, self.alias, self.done = source, target, packing, alias, done
        self.count = self.bytes = 0
        self.names: dict[str, str] = {}  # in NFC -> in the source, of those that are not ASCII
        self.faults: list[Fault] = []
        self.shared: dict[Place, _There] = {}  # what is stood on in the source -> the same in the target
        self.early: set[str] = set()  # names whose history came before its turn, for others stand on it

    def records(self, names: Iterator[str], version: Which) -> Iterator[Record]:
        while page := list(islice(names, PAGE)):
            try:
                yield from list(self.source.get_many(page, version))
            except ALONE:  # find out which
                for name in page:
                    yield from self._record(name, version)

    def alone(self, name: str) -> bool:
        """Whether no name came before that is the same in the target, which keeps names in Unicode's form NFC."""
        if name.isascii() or (first := self.names.setdefault(composed(name), name)) == name:
            return True
        self.faults.append(Fault(name, None, f"is the same name as {first!a} in the target; copy it by itself"))
        return False

    def _record(self, name: str, version: Which) -> Iterator[Record]:
        try:
            yield self.source.get(name, version)
        except ALONE as error:
            self.faults.append(Fault(name, version if isinstance(version, int) else None, str(error)))

    def _counted(self, versions: Sequence[Version]) -> None:
        self.count += len(versions)
        self.bytes += sum(version.size for version in versions)
        if self.done is not None:
            self.done(self.count)

    def put(self, records: Iterator[Record]) -> None:
        items = self._items(records)
        self.target.put_many(items, packing=self.packing, alias=self.alias, done=self._counted, failed=self._failed)

    def _items(self, records: Iterator[Record]) -> Iterator[Item]:
        for record in records:
            info = record.info
            there = self.shared.get(self.place(info))
            if there is not None and there.own:  # it came along
                if self.alias is not None:
                    self.target.alias(there.name, self.alias, there.version)
                continue
            try:
                on = self._on(info)
            except ALONE as error:
                self.faults.append(Fault(info.name, info.version, str(error)))
            else:
                yield Item(info.name, record, info.metadata, info.tags, on)

    def _failed(self, item: Item, error: KilotuneError) -> None:
        self.faults.append(Fault(item.name, None, str(error)))

    def place(self, info: Version) -> Place:
        """Where a version of the source is."""
        return self.source.namespace, info.name, info.version

    # -- what is stood on --------------------------------------------------------------------------

    def _on(self, info: Version) -> str | None:
        """What a version is to stand on in the target, where that is put if it is not there."""
        if (on := info.stands_on) is None:
            return None
        place = on.namespace, on.name, on.version
        if place not in self.shared:
            self.shared[place] = self._bring(self.source.shared_of(info))
        return f"{self.shared[place].name}/{self.shared[place].version}"

    def _bring(self, record: Record) -> _There:
        info = record.info
        version, made = _brought(self.target, info.name, record, info.metadata, info.tags, self.packing)
        self._counted([version] if made else [])
        own = (version.version, version.sha256) in {(v.version, v.sha256) for v in self.target.versions(version.name)}
        return _There(version.name, version.version, own)

    # -- every version -----------------------------------------------------------------------------

    def put_history(self, name: str, pattern: str | None) -> None:
        """Every version of one adapter and then its aliases; a version that fails is left out, and its aliases too."""
        if name in self.early:
            return
        versions = self.source.versions(name)
        for below in self._own_below(name, versions):
            if all(matches(pattern, [below])):
                self.put_history(below, pattern)
                self.early.add(below)
        new: dict[int, int] = {}
        for info in versions:
            for record in self._record(name, info.version):
                try:
                    new[info.version] = self._put_version(record)
                except ALONE as error:
                    self.faults.append(Fault(name, info.version, str(error)))
                    continue
                if len(versions) > 1 and self.source.standing_on(name, info.version):  # else it is the newest
                    self.shared[self.place(info)] = _There(name, new[info.version], True)
        self._put_aliases(name, new)
        if self.done is not None:
            self.done(self.count)

    def _put_aliases(self, name: str, new: Mapping[int, int]) -> None:
        for alias, version in self.source.aliases(name).items():
            if version in new:
                self.target.alias(name, alias, new[version])
            else:
                self.faults.append(Fault(name, version, f"its alias {alias!r} was left out with it"))

    def _own_below(self, name: str, versions: Sequence[Version]) -> list[str]:
        """Names of the source's own namespace that versions of ``name`` stand on, and whose turn has not been early."""
        places = (version.stands_on for version in versions)
        own = {place.name for place in places if place is not None and place.namespace == self.source.namespace}
        return sorted(own - {name} - self.early)

    def _put_version(self, record: Record) -> int:
        info = record.info
        there = self.shared.get(self.place(info))
        if there is not None and there.own:  # it came along
            return there.version
        made = self.target.put(
            info.name, record, metadata=info.metadata, tags=info.tags, packing=self.packing, on=self._on(info)
        )
        self.count, self.bytes = self.count + 1, self.bytes + made.size
        return made.version


def export_adapters(
    source: AdapterStore,
    folder: str | Path,
    pattern: str | None = None,
    *,
    version: Which = None,
    force: bool = False,
    done: Callable[[int], None] | None = None,
) -> Moved:
    """Write adapters as PEFT does, each into ``folder/<name>``, whole or not at all.

    A shared adapter that one of them stands on is written as well, whatever ``pattern`` says: into ``folder/<name>``
    where ``version`` means that version of it, else into ``folder/<name>.<version>``. What stands on it says so in the
    header of its weights' file (adapter_files/stands_on.py).

    Args:
        source: the store.
        folder: made where it is not there.
        pattern, version: as in :func:`copy_adapters`.
        force: write over an adapter that is there; else it counts as failed.
        done: is told now and then how many there are so far.

    """
    run = _Run(source, source, None, None, done)
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise ConfigError(f"cannot export to {root}: it is a file, expected a folder or nothing")
    out = _Out(run, root, version, force)
    for record in run.records(source.names(pattern), version):
        try:
            out.write(record)
        except ALONE as error:
            run.faults.append(Fault(record.info.name, record.info.version, str(error)))
    return Moved(run.count, run.bytes, tuple(run.faults))


@final
class _Out:
    """Folders of one export."""

    def __init__(self, run: _Run, root: Path, version: Which, force: bool) -> None:
        self.run, self.root, self.version, self.force = run, root, version, force
        self.shared: dict[Place, StandsOn] = {}  # what is stood on -> as folders say it

    def write(self, record: Record) -> None:
        """One adapter, and what it stands on."""
        info, mark = record.info, None
        came = self.shared.get(self.run.place(info))
        if came is not None and came.name == info.name:
            return  # it came along
        if (on := info.stands_on) is not None:
            place = on.namespace, on.name, on.version
            if place not in self.shared:
                self.shared[place] = self._shared(self.run.source.shared_of(info))
            mark = self.shared[place]
        self._put(record, info.name, mark)

    def _shared(self, record: Record) -> StandsOn:
        info = record.info
        try:
            usual = self.run.source.info(info.name, self.version)
        except AdapterError:  # it is of another namespace, or has no such version
            usual = info
        same = (usual.version, usual.sha256) == (info.version, info.sha256)
        mark = StandsOn(info.name if same else f"{info.name}.{info.version}", None, content_sha256(record.file()))
        if not self._has(mark):
            self._put(record, mark.name, None)
        return mark

    def _has(self, mark: StandsOn) -> bool:
        """Whether the folder is there already, with these contents."""
        if not (self.root / mark.name).is_dir():
            return False
        try:
            there = contents_of(self.root / mark.name)
            return StandsOn.of_header(there.header) is None and content_sha256(there.file) == mark.sha256
        except (CheckpointError, ConfigError):
            return False

    def _put(self, record: Record, name: str, mark: StandsOn | None) -> None:
        place = self.root / name
        if place.exists() and not self.force:
            raise CheckpointError(f"{place} is there already; move it away, or write over it with force")
        tensors = record.tensors()
        write(place, record.config, tensors, with_mark(record.header(tensors), mark), record.files)
        run = self.run
        run.count, run.bytes = run.count + 1, run.bytes + record.info.size
        if run.done is not None and run.count % PAGE == 0:
            run.done(run.count)
