"""Every tenant's adapters: in the store, in main memory, on the device; and what a request's words mean.

An adapter is known by its contents (:class:`~.interface.AdapterKey`), and its numbers are kept by tenant and contents.
So a new version is another adapter: requests that run keep the one that they began with, and no batch mixes two
versions.

While the store is away, names that were resolved before go on to mean what they meant, and adapters that are in memory
are served; everything else is a StoreError, which goes away with its cause.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import nn

from ...adapter_files.names import composed
from ...adapter_files.reading import AdapterFile
from ...errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    StoreError,
    StoreFullError,
    StoreLimitError,
    UnsupportedError,
    did_you_mean,
)
from ...fleet.stepper.wrapping import wrap
from ...fleet.store import AdapterStore, Contents, Fingerprint, Record, SharedVersion, Version, open_store
from ...fleet.store.adapter_store import Adapter, Which
from ...fleet.store.names import SHARED, check_name, check_which
from ...fleet.store.preparing import check_said, contents_of
from ...fleet.store.purging import purge
from ...patterns import UPLOAD, matching
from .cache_words import CacheWords
from .device_adapters import Residents, Row
from .interface import AdapterKey

__all__ = ["AdapterRegistry"]

T = TypeVar("T")
Trial = Callable[[Row, str], None]
"""Runs something small through an adapter, in turn with a tenant's requests; an UnsupportedError where that fails."""
HANDLES = 256  # of namespaces, that are kept open
RESOLVED = 65_536  # names whose last meaning is remembered
NEAR = 1000  # names among which the nearest ones are looked for
# What a store says of an SQLite file or a server that is away, and an OSError of what lies beneath.
AWAY = (StoreError, OSError)


@final
class AdapterRegistry:
    """The adapters of all tenants, over one store and one model. From any thread; may wait for the store.

    Args:
        store: the store's URL, as :func:`~kilotune.fleet.open_store` takes it.
        model: the base model; it is wrapped in place and frozen.
        slots: how many adapters of one form the device holds at once.
        forms: how many forms (method, options, layers) there may be at once.
        whole: how many adapters that no bank can take (heads that are trained whole) there may be at once.
        host_bytes: how much main memory adapters take that are not on the device.
        max_norm: the largest L2 norm that a tensor of an adapter may have.
        max_rank: the largest rank that an adapter may have.
        form_bytes: what the adapters of one form take on the device at most; large ones get fewer slots.
        dtype: in which the device holds them: float32, bfloat16, float16.
        packing: how the store keeps the numbers of what is put here.
        timeout: seconds to wait for a store that is busy.

    Raises:
        StoreError: the store cannot be opened. ConfigError: an option.

    """

    def __init__(
        self,
        store: str | Path,
        model: nn.Module,
        *,
        slots: int = 256,
        forms: int = 4,
        whole: int = 16,
        host_bytes: int = 2**30,
        max_norm: float = 1e4,
        max_rank: int = 4096,
        form_bytes: int = 4 * 2**30,
        dtype: torch.dtype = torch.float32,
        packing: str = "float32",
        timeout: float = 10.0,
    ) -> None:
        least = {"slots": slots, "forms": forms, "max_rank": max_rank, "form_bytes": form_bytes}
        faults = [f"{name}: expected at least 1, got {value}" for name, value in least.items() if value < 1]
        if faults or not max_norm > 0:
            raise ConfigError("; ".join(faults) or f"max_norm: expected a number above 0, got {max_norm!r}")
        self.url, self.fingerprint = str(store), Fingerprint.of(model)
        self.model = wrap(model).eval()
        self.residents = Residents(
            self.model,
            slots=slots,
            forms=forms,
            whole=whole,
            dtype=dtype,
            max_norm=max_norm,
            max_rank=max_rank,
            form_bytes=form_bytes,
        )
        self.host_bytes, self._packing, self._timeout = host_bytes, packing, timeout
        self._lock = threading.RLock()
        self._handles: OrderedDict[str, AdapterStore] = OrderedDict()
        self._rows: OrderedDict[str, Row] = OrderedDict()  # the least recently used first
        self._row_bytes = 0
        self._loading: dict[str, threading.Event] = {}
        self._resolved: OrderedDict[tuple[str, str, Which], AdapterKey] = OrderedDict()
        self._unstored: dict[str, AdapterFile] = {}
        self.cache_words = CacheWords()
        self._away: str | None = None
        self.trial: Trial | None = None
        self._store("default")  # it must be there now; later it may come and go

    # -- the store -------------------------------------------------------------------------------

    def _store(self, namespace: str) -> AdapterStore:
        with self._lock:
            if namespace in self._handles:
                self._handles.move_to_end(namespace)
                return self._handles[namespace]
        made = open_store(
            self.url, namespace=namespace, base=self.fingerprint, packing=self._packing, timeout=self._timeout
        )
        with self._lock:
            kept = self._handles.setdefault(namespace, made)
            while len(self._handles) > HANDLES:
                self._handles.popitem(last=False)  # who still uses it keeps it open
        return kept

    def _ask(self, namespace: str, question: Callable[[AdapterStore], T]) -> T:
        """Ask the store, and remember whether it answered."""
        try:
            answer = question(self._store(namespace))
        except (StoreFullError, StoreLimitError):  # it has answered
            self._away = None
            raise
        except AWAY as error:
            self._away = str(error)
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"the store does not answer: {error}") from error
        except AdapterError:
            self._away = None
            raise
        self._away = None
        return answer

    def store_state(self) -> str | None:
        """None, or why the store did not answer when it was asked last."""
        return self._away

    # -- what tenants ask ------------------------------------------------------------------------

    def resolve(self, namespace: str, name: str, which: Which = None) -> AdapterKey:
        """What a name means now; while the store is away, what it meant last.

        Raises:
            AdapterError: there is no such adapter in this namespace, with the nearest names of it alone.
            StoreError: the store is away, and the name has not been resolved before.

        """
        place = (namespace, check_name(name), check_which(which))
        try:
            found = self._ask(namespace, lambda store: store.info(name, which))
        except StoreError:
            with self._lock:
                known = self._resolved.get(place)
            if known is None:
                raise
            return known
        if (on := found.stands_on) is not None and on.removed:
            raise AdapterError(f"adapter {name!r}, version {found.version} stands on {on}, which was removed")
        key = replace(AdapterKey.of(namespace, found), name=name)
        with self._lock:
            self._resolved[place] = key
            self._resolved.move_to_end(place)
            while len(self._resolved) > RESOLVED:
                self._resolved.popitem(last=False)
        return key

    def own_files(self, key: AdapterKey) -> Mapping[str, bytes]:
        """What an adapter brings beside its numbers; where that is nothing, what the one beneath it does.

        Raises:
            AdapterError: it is not there any more. CheckpointError: it is damaged. StoreError: the store.

        """

        def files(store: AdapterStore) -> dict[str, bytes]:
            record = store.get(key.name, key.version)
            if record.info.sha256 != key.sha256:
                raise CheckpointError(f"adapter {key.name!r}, version {key.version}: the store holds other contents")
            if record.files or key.on is None:
                return dict(record.files)
            return dict(store.shared_of(record.info).files)

        return self._ask(key.namespace, files)

    def info(self, namespace: str, name: str, which: Which = None) -> Version:
        """See :meth:`AdapterStore.info`."""
        return self._ask(namespace, lambda store: store.info(name, which))

    def versions(self, namespace: str, name: str) -> list[Version]:
        """See :meth:`AdapterStore.versions`."""
        return self._ask(namespace, lambda store: store.versions(name))

    def aliases(self, namespace: str, name: str) -> dict[str, int]:
        """See :meth:`AdapterStore.aliases`."""
        return self._ask(namespace, lambda store: store.aliases(name))

    def ls(
        self,
        namespace: str,
        pattern: str | None = None,
        *,
        tags: Sequence[str] = (),
        after: str | None = None,
        limit: int | None = None,
    ) -> list[Version]:
        """The newest version of each adapter, by name; see :meth:`AdapterStore.ls`."""
        return self._ask(namespace, lambda store: list(store.ls(pattern, tags=tags, after=after, limit=limit)))

    def nearest(self, namespace: str, name: str) -> str:
        """`` Did you mean 'x'?`` with a name of this namespace, or the empty string."""
        found = self._ask(namespace, lambda store: [v.name for v in store.ls(limit=NEAR)])
        return did_you_mean(name, found)

    # -- what tenants change ---------------------------------------------------------------------

    def put(
        self,
        namespace: str,
        name: str,
        adapter: Adapter,
        *,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        alias: str | None = None,
        on: str | None = None,
    ) -> Version:
        """Check an adapter whole, keep it as the newest version, and have it ready to answer: the steps of a put.

        See :meth:`AdapterStore.put` for the arguments, and the steps for what they raise.
        """
        below = None if on is None else self.settle(namespace, on)
        contents = self.check(namespace, name, adapter, below)
        version, _ = self.keep(namespace, name, contents, metadata=metadata, tags=tags, alias=alias, on=below)
        self.load(AdapterKey.of(namespace, version))
        return version

    def settle(self, namespace: str, on: str) -> SharedVersion:
        """Which shared version an adapter of ``namespace`` is put on top of; see :meth:`AdapterStore.settle`."""
        return self._ask(namespace, lambda store: store.settle(on))

    def shared(self, namespace: str, on: SharedVersion) -> Record:
        """A shared version, whole; see :meth:`AdapterStore.find_shared`."""
        return self._ask(namespace, lambda store: store.find_shared(on))

    def stored(self, namespace: str, version: Version) -> Record:
        """A version, whole; see :meth:`AdapterStore.get`."""
        return self._ask(namespace, lambda store: store.get(version.name, version.version))

    def check(self, namespace: str, name: str, adapter: Adapter, on: SharedVersion | None = None) -> Contents:
        """See that an adapter can be put: files' hashes, base, configuration, shapes, frozen matrices, finite values,
        norms, and that one token runs through it, on top of what it stands on. Nothing is kept.

        Raises:
            CheckpointError, ConfigError, TargetError, UnsupportedError: it is damaged, does not fit this model, or does
            not go with what it stands on.
            AdapterError: a name that cannot be one. ResourceError: no room for another form now, or the engine had no
            time to try it. StoreError: the store is only read.

        """
        what = f"adapter {check_name(name)!r}"
        self._ask(namespace, lambda store: store.check_writable())
        self._ask(namespace, lambda store: store.name_for(name))
        with matching(UPLOAD):
            return self._checked(namespace, name, adapter, what, on)

    def _checked(self, namespace: str, name: str, adapter: Adapter, what: str, on: SharedVersion | None) -> Contents:
        contents = replace(contents_of(adapter), where=Path(name))
        check_said(contents, on)
        if contents.base is not None:
            self.fingerprint.check(contents.base, what, _saved(contents.config))
        self._try(contents.file, namespace, what, None if on is None else self.row(AdapterKey.shared(on)))
        return contents

    def keep(
        self,
        namespace: str,
        name: str,
        contents: Contents,
        *,
        metadata: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        alias: str | None = None,
        on: SharedVersion | None = None,
        first: bool = False,
    ) -> tuple[Version, bool]:
        """Write what :meth:`check` gave into the store, once however often; see :meth:`AdapterStore.put_once`."""
        told: dict[str, Any] = {"metadata": metadata, "tags": tags, "alias": alias, "on": on, "first": first}
        return self._ask(namespace, lambda store: store.put_once(name, contents, **told))

    def load(self, key: AdapterKey) -> None:
        """Read a version back, so that it answers at once and what is served is what is kept; raises as :meth:`row`."""
        self.row(key)

    def _try(self, file: AdapterFile, namespace: str, what: str, below: Row | None) -> None:
        """Check an adapter against the model, and run something through it before anybody can name it."""
        if self.trial is None:
            self.residents.check(file, what)
            return
        row = self.residents.row(f"trial-{uuid.uuid4().hex}", file, what)
        try:
            self.trial(row if below is None else self.residents.stacked(row, below, what), namespace)
        except UnsupportedError as error:
            raise UnsupportedError(f"{what} fits this model, and fails when it runs: {error}") from error
        finally:
            if row.values is None and not row.home.closed:  # it is in the model, under a name that nobody asks for
                self.residents.take_out(row.home)

    def rm(self, namespace: str, name: str, which: Which = None, *, force: bool = False) -> int:
        """See :meth:`AdapterStore.rm`; requests that run keep what they have."""
        count = self._ask(namespace, lambda store: store.rm(name, which, force=force))
        self._forget(namespace, [name])
        return count

    def purge(self, namespace: str, names: Sequence[str]) -> int:
        """Remove adapters for good, out of memory too; see :func:`~kilotune.fleet.store.purging.purge`."""
        keys = [AdapterKey.of(namespace, each) for name in names for each in self.versions(namespace, name)]
        count = self._ask(namespace, lambda store: purge(store, names))
        self._forget(namespace, names)
        with self._lock:
            for key in keys:
                self._drop(_row_name(key))
        return count

    def roll_out(self, namespace: str, alias: str, versions: Mapping[str, Which]) -> dict[str, int]:
        """See :meth:`AdapterStore.roll_out`."""
        moved = self._ask(namespace, lambda store: store.roll_out(alias, versions))
        self._forget(namespace, list(versions))
        return moved

    def roll_back(self, namespace: str, alias: str, names: Iterable[str]) -> dict[str, int]:
        """See :meth:`AdapterStore.roll_back`."""
        own = list(names)
        moved = self._ask(namespace, lambda store: store.roll_back(alias, own))
        self._forget(namespace, own)
        return moved

    def unalias(self, namespace: str, name: str, alias: str) -> None:
        """See :meth:`AdapterStore.unalias`."""
        self._ask(namespace, lambda store: store.unalias(name, alias))
        self._forget(namespace, [name])

    def _forget(self, namespace: str, names: Sequence[str]) -> None:
        """What these names meant is not what they mean."""
        gone = {*map(composed, names)}
        with self._lock:
            for place in [p for p in self._resolved if p[0] == namespace and composed(p[1]) in gone]:
                del self._resolved[place]

    # -- what the engine asks --------------------------------------------------------------------

    def there(self, key: AdapterKey) -> Row | None:
        """The adapter, if it is in memory; does not wait."""
        name = _row_name(key)
        with self._lock:
            row = self._rows.get(name)
            if row is None or row.closed:
                return None
            for each in row.chain:
                if each.name in self._rows:
                    self._rows.move_to_end(each.name)
            return row

    def row(self, key: AdapterKey) -> Row:
        """The adapter in main memory, read from the store where it is not; checked against its hash.

        Raises:
            AdapterError: it is not there any more. CheckpointError and others: it is broken. StoreError: the store.

        """
        name = _row_name(key)
        while True:
            if (row := self.there(key)) is not None:
                return row
            with self._lock:
                waiting = self._loading.get(name)
                if waiting is None:
                    self._loading[name] = threading.Event()
                    break
            waiting.wait()
        try:
            row = self._read(key, name)
            self._keep(row)
            return row
        finally:
            with self._lock:
                self._loading.pop(name).set()

    @contextmanager
    def unstored(
        self, namespace: str, name: str, contents: Contents, on: SharedVersion | None = None
    ) -> Iterator[AdapterKey]:
        """Have an adapter answer that is in no store, by the key that is given, until the context is left.

        Args:
            namespace: whose it is.
            name: for errors; nobody can ask for it by this.
            contents: of it, which are those of this model's adapters.
            on: what it stands on.

        """
        below = None if on is None else AdapterKey.shared(on)
        key = AdapterKey(namespace, name, 0, f"{uuid.uuid4().hex}", below)  # shares no cache with what comes later
        self._unstored[_row_name(key)] = contents.file
        try:
            yield key
        finally:
            del self._unstored[_row_name(key)]
            with self._lock:
                self._drop(_row_name(key))

    def _read(self, key: AdapterKey, name: str) -> Row:
        if (file := self._unstored.get(name)) is not None:
            what = f"adapter {key.name!r}"
            row = self.residents.row(name, file, what)
            return row if key.on is None else self.residents.stacked(row, self.row(key.on), what)
        record = self._ask(key.namespace, lambda store: store.get(key.name, key.version))
        if record.info.sha256 != key.sha256:
            raise CheckpointError(
                f"adapter {key.name!r}, version {key.version}: the store holds other contents than when it was named"
            )
        what = f"adapter {key.name!r}, version {key.version}"
        below = self._below(key, record.info, what)
        with matching(UPLOAD):
            row = self.residents.row(name, record.file(), what)
        return row if below is None else self.residents.stacked(row, below, what)

    def _below(self, key: AdapterKey, version: Version, what: str) -> Row | None:
        """The shared adapter that a version stands on.

        Raises:
            AdapterError: it was removed. And what :meth:`row` raises.

        """
        on = version.stands_on
        if on is None:
            return None
        assert on.namespace in (key.namespace, SHARED)  # the store sees to that
        try:
            return self.row(AdapterKey.shared(on))
        except AdapterError as error:
            raise AdapterError(f"{what} stands on {on}, which was removed or is broken: {error}") from error

    def _keep(self, row: Row) -> None:
        with self._lock:
            self._drop(row.name)
            self._rows[row.name] = row
            self._row_bytes += row.bytes
            while self._row_bytes > self.host_bytes and len(self._rows) > 1:
                self._drop(next(iter(self._rows)))

    def _drop(self, name: str) -> None:
        old = self._rows.pop(name, None)
        if old is not None:
            self._row_bytes -= old.bytes

    def close(self) -> None:
        """Let go of the store."""
        with self._lock:
            handles, self._handles = list(self._handles.values()), OrderedDict()
        for handle in handles:
            handle.close()


def _row_name(key: AdapterKey) -> str:
    """Unique to a tenant and the contents: tenants share no row, so that none can time another's."""
    return hashlib.sha256(f"{key.sha256} {key.namespace}".encode()).hexdigest()


def _saved(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("modules_to_save") or ()
    return (named,) if isinstance(named, str) else tuple(named)
