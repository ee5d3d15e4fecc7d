"""A folder of adapters, as PEFT writes them, read as a store: ``open_store("adapters/")``.

::

    adapters/
      adapter_config.json, ...     where it is there: the adapter "default"
      ann/adapter_config.json, ... the adapter "ann"

It is for reading. Every adapter has one version, 1, and there are no aliases, tags, metadata and namespaces; what a
folder lacks is an error, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, final

from ...adapter_files.content import content_sha256
from ...adapter_files.files import CONFIG_NAME, WEIGHTS_NAME
from ...adapter_files.own_files import OWN_FILES
from ...adapter_files.stands_on import StandsOn, with_mark
from ...errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    KilotuneError,
    StoreError,
    StoreLimitError,
    did_you_mean,
)
from ...injection.fingerprint import Fingerprint
from .adapter_store import ONLY_READ, Adapter, AdapterStore, Item, Which
from .names import (
    check_limit,
    check_name,
    check_namespace,
    check_on,
    check_tags,
    check_which,
    literal_prefix,
    matches,
    spellings,
)
from .preparing import Preparer, folder_contents
from .reading import moment
from .records import Collected, Fault, Record, SharedVersion, Standing, Stats, Version

__all__ = ["FolderStore"]

ROOT = "default"  # PEFT's name for the adapter that is in the folder itself
ONLY = 1


@final
class FolderStore(AdapterStore):
    """See :class:`AdapterStore`; made by :func:`open_store`."""

    def __init__(self, path: Path, namespace: str, base: Fingerprint | None = None) -> None:
        self.url, self.path, self.base, self.read_only = str(path), path, base, True
        self.namespace = check_namespace(namespace)
        if namespace != ROOT:
            raise ConfigError(
                f"namespace={namespace!r}: a folder has none; open {path / namespace} as a store of its own, or "
                "import it into a database"
            )
        self._prepare = Preparer(None, "float32")
        self._closed = False

    # -- reading -----------------------------------------------------------------------------------

    def _place(self, name: str) -> Path:
        """The folder of an adapter.

        Raises:
            AdapterError: there is none. CheckpointError: it is a link that leads out of the store.

        """
        if self._closed:
            raise StoreError(f"the store {self.url} is closed; open it again")
        check_name(name)
        inner = next(
            (p for way in spellings(name) if ((p := self.path / way) / CONFIG_NAME).is_file()), self.path / name
        )
        place = inner if (inner / CONFIG_NAME).is_file() else self.path if name == ROOT else inner
        if not (place / CONFIG_NAME).is_file():
            raise AdapterError(f"there is no adapter {name!r} in {self.path}.{did_you_mean(name, self._names())}")
        root = self.path.resolve()
        for file in (place / CONFIG_NAME, place / WEIGHTS_NAME, *(place / name for name in OWN_FILES)):
            if not file.resolve().is_relative_to(root):
                raise CheckpointError(f"{file} is a link that leads out of {self.path}")
        return place

    def _names(self) -> list[str]:
        found = [path.parent.name for path in self.path.glob(f"*/{CONFIG_NAME}")]
        if (self.path / CONFIG_NAME).is_file():
            if ROOT in found:
                raise StoreError(f"{self.path} has an adapter {ROOT!r} both in itself and in {ROOT}/; move one away")
            found.append(ROOT)
        return sorted(name for name in found if _is_name(name))

    def get(self, name: str, version: Which = None) -> Record:
        if check_which(version) not in (None, ONLY):
            raise AdapterError(f"{name!r} has no version {version!r}; adapters in folders have the version {ONLY} only")
        place = self._place(name)
        contents = folder_contents(place)
        mark = StandsOn.of_header(contents.header)
        ready = self._prepare(name, replace(contents, header=with_mark(contents.header, None)), None, ())
        form = replace(ready.form, header=with_mark(ready.form.header, mark))
        written = max(
            (place / file).stat().st_mtime_ns for file in (CONFIG_NAME, WEIGHTS_NAME) if (place / file).exists()
        )
        info = Version(
            name=name,
            version=ONLY,
            sha256=form.content_hash(ready.packed).hex(),
            created=moment(written // 1000),
            used=None,
            metadata={},
            tags=(),
            packing=form.layout.packing,
            size=len(ready.packed),
            form=form.sha256,
            base=None,
            stands_on=None if mark is None else SharedVersion(mark.name, ONLY, mark.sha256, ROOT),
            files=dict(form.files),
        )
        return Record(info, form, ready.packed, ready.frozen, ready.files)

    def info(self, name: str, version: Which = None) -> Version:
        return self.get(name, version).info

    def settle(self, on: str | SharedVersion) -> SharedVersion:
        record = self.find_shared(on)
        return SharedVersion(record.info.name, ONLY, content_sha256(record.file()), ROOT)

    def find_shared(self, on: str | SharedVersion) -> Record:
        name, which = (on.name, on.version) if isinstance(on, SharedVersion) else check_on(on)
        record = self.get(name, which)
        if record.info.stands_on is not None:
            raise ConfigError(
                f"on={name!r}: it stands on {record.info.stands_on.name!r} itself; a stack has two levels"
            )
        return record

    def shared_of(self, version: Version) -> Record:
        on, who = version.stands_on, f"{version.name!r} in {self.path}"
        if on is None:
            raise AdapterError(f"{who} stands on no other adapter")
        try:
            record = self.get(on.name)
        except AdapterError as error:
            raise AdapterError(f"{who} stands on {on.name!r}, which is not there: {error}") from None
        if (actual := content_sha256(record.file())) != on.sha256:
            raise CheckpointError(
                f"{who} stands on {on.name!r} with the contents {on.sha256[:12]}..., and the one there has "
                f"{actual[:12]}...: it was changed since"
            )
        return record

    def standing_on(self, name: str, version: Which = None) -> Standing:
        self.get(name, version)
        found = [info.name for info in self.ls() if info.stands_on is not None and info.stands_on.name == name]
        return Standing(tuple(found[:5]), len(found), 0)

    def versions(self, name: str) -> list[Version]:
        try:
            self._place(name)
        except AdapterError:
            if not _is_name(name):
                raise
            return []
        return [self.info(name)]

    def aliases(self, name: str) -> dict[str, int]:
        self._place(name)
        return {}

    def get_many(self, names: Iterable[str], version: Which = None) -> Iterator[Record]:
        return (self.get(name, version) for name in names)

    def ls(
        self,
        pattern: str | None = None,
        *,
        tags: Sequence[str] = (),
        versions: bool = False,
        after: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Version]:
        if check_tags(tags):
            raise StoreLimitError(
                f"{self.path} is a folder, and adapters in folders have no tags", "is a folder, which has no tags"
            )
        start, most = "" if after is None else check_name(after), check_limit(limit)
        return islice((self.info(name) for name in self.names(pattern) if name > start), most)

    def names(self, pattern: str | None = None) -> Iterator[str]:
        prefix, names = literal_prefix(pattern), self._names()
        return (name for name, fits in zip(names, matches(pattern, names)) if fits and name.startswith(prefix))

    def verify(self, names: Iterable[str] | None = None) -> Iterator[Fault]:
        for name in self._names() if names is None else names:
            try:
                record = self.get(name)
                record.file()
                if record.info.stands_on is not None:
                    self.shared_of(record.info)
            except KilotuneError as error:
                yield Fault(name, ONLY, str(error))

    def stats(self) -> Stats:
        found = list(self.ls())
        size = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file() and not path.is_symlink())
        return Stats(
            names=len(found),
            versions=len(found),
            aliases=0,
            forms=len({info.form for info in found}),
            packed={"float32": sum(info.size for info in found)} if found else {},
            metadata_bytes=sum(len(info.name.encode()) for info in found),
            store_bytes=size,
        )

    def close(self) -> None:
        self._closed = True

    # -- what a folder does not do -----------------------------------------------------------------

    def check_writable(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StoreLimitError(
            f"{self.url} is a folder, which a store only reads; import it into a database (kilotune store import), and "
            "change it there",
            ONLY_READ,
        )

    def name_for(self, name: str) -> str:
        self._refuse()

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
        self._refuse()

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
        self._refuse()

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
        self._refuse()

    def rm(self, name: str, version: Which = None, *, force: bool = False) -> int:
        self._refuse()

    def alias(self, name: str, alias: str, version: Which = None, *, expected: int | None = None) -> int:
        self._refuse()

    def roll_out(self, alias: str, versions: Mapping[str, Which]) -> dict[str, int]:
        self._refuse()

    def roll_back(self, alias: str, names: Iterable[str]) -> dict[str, int]:
        self._refuse()

    def unalias(self, name: str, alias: str) -> None:
        self._refuse()

    def gc(
        self,
        *,
        keep: int | None = None,
        unused_for: timedelta | None = None,
        compact: bool = False,
        dry_run: bool = False,
    ) -> Collected:
        self._refuse()


def _is_name(name: object) -> bool:
    try:
        check_name(name)
    except AdapterError:
        return False
    return True
