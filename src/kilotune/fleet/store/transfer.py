"""Many adapters from one store to another, or out into a folder: one after the other, in little memory.

What is broken fails alone and is reported; the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import final

from ...adapter_files.names import composed
from ...errors import AdapterError, CheckpointError, ConfigError, KilotuneError
from .adapter_store import AdapterStore, Item, Which
from .records import Fault, Moved, Record, Version

__all__ = ["copy_adapters", "export_adapters"]

PAGE = 500  # adapters read together


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
            run.put_history(name)
    else:
        run.put(run.records(names, version))
    return Moved(run.count, run.bytes, tuple(run.faults))


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

    def records(self, names: Iterator[str], version: Which) -> Iterator[Record]:
        while page := list(islice(names, PAGE)):
            try:
                yield from list(self.source.get_many(page, version))
            except (AdapterError, CheckpointError, ConfigError):  # find out which
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
        except (AdapterError, CheckpointError, ConfigError) as error:
            self.faults.append(Fault(name, version if isinstance(version, int) else None, str(error)))

    def put(self, records: Iterator[Record]) -> None:
        def told(versions: Sequence[Version]) -> None:
            self.count += len(versions)
            self.bytes += sum(version.size for version in versions)
            if self.done is not None:
                self.done(self.count)

        items = (Item(record.info.name, record, record.info.metadata, record.info.tags) for record in records)
        self.target.put_many(items, packing=self.packing, alias=self.alias, done=told, failed=self._failed)

    def _failed(self, item: Item, error: KilotuneError) -> None:
        self.faults.append(Fault(item.name, None, str(error)))

    def put_history(self, name: str) -> None:
        """Every version of one adapter and then its aliases; a version that fails is left out, and its aliases too."""
        new: dict[int, int] = {}
        for info in self.source.versions(name):
            for record in self._record(name, info.version):
                try:
                    made = self.target.put(name, record, metadata=info.metadata, tags=info.tags, packing=self.packing)
                except (AdapterError, CheckpointError, ConfigError) as error:
                    self.faults.append(Fault(name, info.version, str(error)))
                    continue
                new[info.version] = made.version
                self.count, self.bytes = self.count + 1, self.bytes + made.size
        for alias, version in self.source.aliases(name).items():
            if version in new:
                self.target.alias(name, alias, new[version])
            else:
                self.faults.append(Fault(name, version, f"its alias {alias!r} was left out with it"))
        if self.done is not None:
            self.done(self.count)


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
    for record in run.records(source.names(pattern), version):
        place = root / record.info.name
        try:
            if place.exists() and not force:
                raise CheckpointError(f"{place} is there already; move it away, or write over it with force")
            record.save(place)
        except CheckpointError as error:
            run.faults.append(Fault(record.info.name, record.info.version, str(error)))
            continue
        run.count, run.bytes = run.count + 1, run.bytes + record.info.size
        if done is not None and run.count % PAGE == 0:
            done(run.count)
    return Moved(run.count, run.bytes, tuple(run.faults))
