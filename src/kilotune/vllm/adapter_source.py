"""A request's model name -> an adapter of the store, validated and written as a row file for the workers."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from ..errors import AdapterError, CheckpointError, ConfigError, ResourceError, StoreError
from ..fleet.store import AdapterStore, Fingerprint, Version, open_store
from . import worker_status as run
from .admission import row_of
from .base_fingerprint import fingerprint_of_files
from .merged_base import Merged, check_merged
from .row_files import write_row
from .settings import STORE

__all__ = ["Found", "Source", "shared"]

KNOWN = 65_536  # names that are remembered
PINNED = re.compile(r"([0-9]{1,10})\.([0-9a-f]{12})")


@final
@dataclass(frozen=True, slots=True)
class Found:
    """An adapter that may be served. name: of this very content, which never means another one. path: of its row."""

    name: str
    path: str


@final
@dataclass(frozen=True, slots=True)
class _Asked:
    """A model name, taken apart. which: a version or alias, or None. content: what its SHA-256 begins with."""

    namespace: str
    name: str
    which: int | str | None
    content: str = ""


@final
class Source:
    """Adapters of one engine by model name: ``ann``, ``ann@3``, ``ann@live``, or with ``tenant/`` before it.

    May be used from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._served: run.Served | None = None
        self._stamp: int | None = None
        self._stores: OrderedDict[str, AdapterStore] = OrderedDict()
        self._base: tuple[Fingerprint, Merged | None] | None = None
        self._known: OrderedDict[str, Found] = OrderedDict()  # by pinned name
        self._last: OrderedDict[str, str] = OrderedDict()  # what a name meant last -> pinned
        self._admitted: set[str] = set()

    def served(self) -> run.Served | None:
        """What the engine serves; None while (or where) the plugin is not active in all of its workers."""
        with self._lock:
            stamp = run.stamp()
            if stamp is not None and stamp != self._stamp:  # None: the file was cleared away, and the engine goes on
                self._served = run.served()
                self._stamp = None if self._served is None else stamp
                self._known.clear()  # rows of an engine that is no more
                self._last.clear()
                self._admitted.clear()
                self._base = None
                self._stores.clear()
            return self._served

    def find(self, model: str) -> Found | None:
        """The adapter that a request names, or None where the name is none of ours, or nobody's.

        Raises:
            CheckpointError, UnsupportedError: it cannot be served. StoreError: the store cannot be read, and the
                adapter is not here yet. ResourceError: this engine takes in no more adapters.

        """
        served = self.served()
        with self._lock:
            if (known := self._known.get(model)) is not None:
                self._known.move_to_end(model)
                return known
        asked = None if served is None else _parse(model, served)
        if served is None or asked is None:
            return None
        try:
            info = self._store(asked.namespace, served).info(asked.name, asked.which)
        except AdapterError:
            return None
        except StoreError:
            with self._lock:  # what is resident goes on
                if (last := self._last.get(model)) in self._known:
                    return self._known[str(last)]
            raise
        if not info.sha256.startswith(asked.content):
            return None
        return self._admit(model, asked, info, served)

    def renew(self, model: str, lost: Found) -> Found | None:
        """The same as :meth:`find`, after a worker could not load what that gave: its row is written anew."""
        with self._lock:
            for path in (Path(lost.path), run.mark_of(lost.path)):
                path.unlink(missing_ok=True)
            self._known.pop(lost.name, None)
            self._admitted.discard(Path(lost.path).name)
        return self.find(model)

    def _admit(self, model: str, asked: _Asked, info: Version, served: run.Served) -> Found:
        prefix = "" if served.settings.namespace is not None else f"{asked.namespace}/"
        pinned = f"{prefix}{info.name}@{info.version}.{info.sha256[:12]}"
        with self._lock:
            known, count = self._known.get(pinned), len(self._admitted)
        if known is None:
            if count >= served.settings.max_adapters:
                raise ResourceError(
                    f"this engine has taken in {count} adapters and takes no more; restart it, or raise max_adapters"
                )
            # Others go on meanwhile; whoever does the same gets the same file.
            known = Found(pinned, str(self._write(asked, info, served)))
        with self._lock:
            self._admitted.add(Path(known.path).name)
            _remember(self._known, pinned, known)
            _remember(self._last, model, pinned)
            return known

    def _write(self, asked: _Asked, info: Version, served: run.Served) -> Path:
        try:
            record = self._store(asked.namespace, served).get(info.name, info.version)
        except AdapterError as error:
            raise CheckpointError(f"{info.name!r} was removed while it was read") from error
        if record.info.sha256 != info.sha256:
            raise CheckpointError(f"{info.name!r} was changed while it was read; ask again")
        row = row_of(record, served, *self._fingerprint(served))
        try:
            return write_row(run.folder(), row, served.layout)
        except OSError as error:
            raise StoreError(f"the row of {info.name!r} cannot be written: {error}") from error

    def _fingerprint(self, served: run.Served) -> tuple[Fingerprint, Merged | None]:
        """(of the engine's base, what is merged into it on top)."""
        with self._lock:
            if self._base is None:
                merged = check_merged(served.settings.on, served.model)
                self._base = fingerprint_of_files(served.model) if merged is None else merged.base, merged
            return self._base

    def _store(self, namespace: str, served: run.Served) -> AdapterStore:
        with self._lock:
            if (store := self._stores.get(namespace)) is not None:
                self._stores.move_to_end(namespace)
                return store
            url = os.environ.get(STORE) or served.settings.store
            if not url:
                raise ConfigError(f"no store: set the environment variable {STORE}, or 'store' in additional_config")
            store = open_store(url, namespace=namespace, timeout=10.0, read_only=not url.startswith("postgres"))
            _remember(self._stores, namespace, store, 64)
            return store


def _remember(known: OrderedDict[str, Any], key: str, value: Any, limit: int = KNOWN) -> None:
    known[key] = value
    known.move_to_end(key)
    if len(known) > limit:
        known.popitem(last=False)


def _parse(model: str, served: run.Served) -> _Asked | None:
    settings = served.settings
    namespace, slash, rest = model.rpartition("/")
    if bool(slash) != (settings.namespace is None):
        return None
    name, at, word = rest.partition("@")
    for part in (name, namespace) if slash else (name,):
        if len(part) > 200 or not re.fullmatch(settings.pattern, part):
            return None
    if at and not re.fullmatch(r"[\w.-]{1,100}", word, re.ASCII):
        return None
    owner = namespace if settings.namespace is None else settings.namespace
    if pinned := PINNED.fullmatch(word):
        return _Asked(owner, name, int(pinned[1]), pinned[2])
    which: int | str | None = int(word) if word.isdecimal() else word or settings.alias
    return _Asked(owner, name, which)


_SHARED = Source()


def shared() -> Source:
    """The one of this process, which the resolver and the gate both use."""
    return _SHARED
