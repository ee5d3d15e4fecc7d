"""Where finished adapters of a joint training go: a store, folders in PEFT's layout, or the caller's function."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from ..errors import CheckpointError, ConfigError, KilotuneError, StoreError, type_name
from ..files import WEIGHTS_NAME, read_weights, write
from .store import AdapterStore, Contents, Item
from .users import UserReport

__all__ = ["CallSink", "Finished", "FolderSink", "Sink", "StoreSink", "sink_of"]

RUN = "kilotune_fleet_run"  # in a store's metadata, and in the header of a file: which training an adapter is of


@final
@dataclass(frozen=True, eq=False)
class Finished:
    """An adapter that is trained. contents: as its two files have it. run: the training that it is of."""

    name: str
    contents: Contents
    report: UserReport
    run: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Sink(ABC):
    """Takes finished adapters."""

    @abstractmethod
    def put(self, finished: Sequence[Finished]) -> list[str | None]:
        """Keep them; once this returns they are on disk. For each, None, or why it cannot be kept (it alone).

        Whatever this raises ends the training, whose state keeps those adapters for a resume.
        """

    def has(self, name: str, run: str) -> bool:
        """Whether the adapter of this training is here already; asked when a broken training is resumed."""
        return False


@final
class StoreSink(Sink):
    """Into an adapter store.

    Args:
        store: opened for writing.
        alias: names each new version from then on, in the same instant; None: no alias.
        tags: for each.

    """

    def __init__(self, store: AdapterStore, alias: str | None = None, tags: Sequence[str] = ()) -> None:
        if store.read_only:
            raise ConfigError(f"sink: the store {store.url} is open for reading only")
        self.store, self.alias, self.tags = store, alias, tuple(tags)

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
        told = {"steps": one.report.steps, "ended": one.report.ended}
        return Item(one.name, one.contents, {**one.metadata, **told, RUN: one.run}, self.tags)

    def _alone(self, item: Item) -> str | None:
        try:
            self.store.put_many([item], alias=self.alias)
        except StoreError:
            raise
        except KilotuneError as error:
            return str(error)
        return None

    def has(self, name: str, run: str) -> bool:
        return any(version.metadata.get(RUN) == run for version in self.store.versions(name))


@final
class FolderSink(Sink):
    """A folder for each adapter, in PEFT's layout, under ``folder``; an adapter of the same name is replaced."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def put(self, finished: Sequence[Finished]) -> list[str | None]:
        for one in finished:
            kept = one.contents
            write(self.folder / one.name, kept.config, kept.tensors, {**kept.header, RUN: one.run})
        return [None] * len(finished)

    def has(self, name: str, run: str) -> bool:
        try:
            return read_weights(self.folder / name / WEIGHTS_NAME)[1].get(RUN) == run
        except CheckpointError:
            return False


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
