"""Where finished adapters of a joint training go: a store, folders in PEFT's layout, or the caller's function."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

from ...adapter_files.content import content_sha256
from ...adapter_files.files import WEIGHTS_NAME, read_weights, write
from ...adapter_files.reading import AdapterFile
from ...errors import AdapterError, CheckpointError, ConfigError, KilotuneError, StoreError, type_name
from ..store import AdapterStore, Contents, Item, StandsOn
from ..store.stands_on import METADATA
from ..store.transfer import bring
from .users import UserReport

__all__ = ["CallSink", "Finished", "FolderSink", "Sink", "StoreSink", "sink_of"]

KEY = "kilotune_fleet"  # in a store's metadata, and in the header of a file: which training an adapter is of
LISTED = 100  # of a user's losses and evaluations that stand there; a store's metadata has room for so much


@final
@dataclass(frozen=True, eq=False)
class Finished:
    """An adapter that is trained. contents: as its two files have it. run: the training that it is of.

    stands_on: the adapter beneath it, which its contents' header names too; None: it stands on the base.
    """

    name: str
    contents: Contents
    report: UserReport
    run: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stands_on: StandsOn | None = None


class Sink(ABC):
    """Takes finished adapters. remembers: whether :meth:`find` finds them again. store: the one that it puts into."""

    remembers: ClassVar[bool] = False
    store: AdapterStore | None = None

    def stand_on(self, on: StandsOn, file: AdapterFile) -> None:  # noqa: B027 - most have nothing to do
        """Told once, before a training whose adapters all stand on a shared one, which is read already."""

    @abstractmethod
    def put(self, finished: Sequence[Finished]) -> list[str | None]:
        """Keep them; once this returns they are on disk. For each, None, or why it cannot be kept (it alone).

        Whatever this raises ends the training, whose state keeps those adapters for a resume.
        """

    def find(self, name: str, run: str) -> UserReport | None:
        """The report of an adapter of this training that is here already; asked when a broken training is resumed."""
        return None


def _told(one: Finished) -> dict[str, Any]:
    report = one.report.to_dict()
    lists = {key: report[key][-LISTED:] for key in ("losses", "validation")}
    return {"run": one.run, "report": {**report, **lists}}


def _report(told: Any, run: str) -> UserReport | None:
    """What :func:`_told` told, if it was this training."""
    if not isinstance(told, Mapping) or told.get("run") != run:
        return None
    try:
        return UserReport.from_dict(told["report"])
    except (KeyError, TypeError, ValueError):
        return None


@final
class StoreSink(Sink):
    """Into an adapter store.

    Args:
        store: opened for writing.
        alias: names each new version from then on, in the same instant; None: no alias.
        tags: for each.

    """

    remembers = True
    store: AdapterStore

    def __init__(self, store: AdapterStore, alias: str | None = None, tags: Sequence[str] = ()) -> None:
        if store.read_only:
            raise ConfigError(f"sink: the store {store.url} is open for reading only")
        self.store, self.alias, self.tags = store, alias, tuple(tags)
        self._on: str | None = None

    def stand_on(self, on: StandsOn, file: AdapterFile) -> None:
        """Have the shared adapter in the store, under its name, where it is not there already."""
        if on.version is not None and (place := self._place(on)) is not None:
            self._on = place
            return
        files = file.files
        self._on = bring(self.store, on.name, Contents(files.config, files.tensors, files.header))

    def _place(self, on: StandsOn) -> str | None:
        """Where the very version is in this store; None where it is not."""
        try:
            found = self.store.find_shared(f"{on.name}/{on.version}")
        except (AdapterError, ConfigError):
            return None
        return f"{on.name}/{on.version}" if content_sha256(found.file()) == on.sha256 else None

    def put(self, finished: Sequence[Finished]) -> list[str | None]:
        items = [self._item(one) for one in finished]
        try:
            self.store.put_many(items, alias=self.alias, batch=max(1, len(items)))
            return [None] * len(items)
        except StoreError:
            raise
        except KilotuneError:  # one of them is not fit, and none is kept
            return [self._alone(item) for item in items]

    def _item(self, one: Finished) -> Item:
        stands = {} if one.stands_on is None else {METADATA: one.stands_on.to_dict()}
        on = None if one.stands_on is None else self._on
        return Item(one.name, one.contents, {**one.metadata, **stands, KEY: _told(one)}, self.tags, on)

    def _alone(self, item: Item) -> str | None:
        try:
            self.store.put_many([item], alias=self.alias)
        except StoreError:
            raise
        except KilotuneError as error:
            return str(error)
        return None

    def find(self, name: str, run: str) -> UserReport | None:
        found = (_report(version.metadata.get(KEY), run) for version in self.store.versions(name))
        return next((report for report in found if report is not None), None)


@final
class FolderSink(Sink):
    """A folder for each adapter, in PEFT's layout, under ``folder``; an adapter of the same name is replaced."""

    remembers = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"sink: {self.folder} is a file; adapters go into a folder")

    def put(self, finished: Sequence[Finished]) -> list[str | None]:
        for one in finished:
            kept = one.contents
            write(self.folder / one.name, kept.config, kept.tensors, {**kept.header, KEY: json.dumps(_told(one))})
        return [None] * len(finished)

    def find(self, name: str, run: str) -> UserReport | None:
        try:
            told = read_weights(self.folder / name / WEIGHTS_NAME)[1].get(KEY)
            return None if told is None else _report(json.loads(told), run)
        except (CheckpointError, ValueError):  # not there, or not ours
            return None


@final
class CallSink(Sink):
    """The caller's function. An adapter may come twice, where the process is killed before the state knows of it."""

    def __init__(self, function: Callable[[Finished], object]) -> None:
        self.function = function

    def put(self, finished: Sequence[Finished]) -> list[str | None]:
        for one in finished:
            self.function(one)
        return [None] * len(finished)


def sink_of(sink: object) -> Sink:
    """A sink of what :func:`kilotune.fleet.fit` takes for one.

    Raises:
        ConfigError: it is none.

    """
    if isinstance(sink, Sink):
        return sink
    if isinstance(sink, AdapterStore):
        return StoreSink(sink)
    if isinstance(sink, (str, os.PathLike)):
        if "://" in str(sink):
            raise ConfigError(f"sink: {str(sink)!r} is a URL; open it with open_store() and give the store")
        return FolderSink(sink)
    if callable(sink):
        return CallSink(sink)
    raise ConfigError(f"sink: expected an adapter store, a folder or a function, got {type_name(sink)}")
