"""A put, step by step. Each step has its own time, and what is told of it is so.

::

    wait     for a thread, namespaces in turn (admission.py)       too long: nothing was stored
    settle   which version it is put on top of, if it is           too long: nothing was stored
    check    the files, against the base, one token through it     too long: nothing was stored
    keep     one transaction of the store                          too long: stored or not, and never twice
    load     read back what is kept                                too long, or it fails: stored, and not ready yet

The threads of puts are none of those in which requests for answers wait.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, final

from ...adapter_files.files import CONFIG_NAME, WEIGHTS_NAME
from ...adapter_files.own_files import read_own
from ...errors import AdapterError, CheckpointError, ConfigError, KilotuneError
from ...fleet.store import Contents, SharedVersion, Version
from ..engine.interface import AdapterKey
from ..engine.lanes import Lane
from .http_errors import ApiError, of_library
from .logs import log
from .own_files import OwnFiles
from .service import PATIENCE, Catalogue, Service

__all__ = ["Given", "Stored", "put", "uploaded"]

T = TypeVar("T")
KEEPING = 60.0  # seconds that the store has to write an adapter; its own waiting for others is shorter
CHUNK = 1 << 20


@final
@dataclass(frozen=True)
class Given:
    """What a put brings, and what :meth:`AdapterStore.put` takes with it.

    bring: writes the adapter's two files, and what is beside them, into a folder; called once, in a thread of the puts.
    """

    bring: Callable[[Path], None]
    metadata: Mapping[str, Any]
    tags: Sequence[str]
    alias: str | None
    on: str | None = None


@final
@dataclass(frozen=True)
class Stored:
    """What came of a put.

    created: whether the version was made now; else the newest one was the same. lacks: why it does not answer yet;
    None where it does.
    """

    version: Version
    created: bool
    lacks: str | None

    def document(self) -> dict[str, Any]:
        """The body of the answer: as in the lists, but that ``created`` says whether, and ``created_at`` when."""
        note = None
        if self.lacks is not None:
            note = f"version {self.version.version} is stored, and is read when it is first asked for: {self.lacks}"
        told = self.version.to_dict()
        return {**told, "created_at": told["created"], "created": self.created, "ready": note is None, "note": note}


async def put(service: Service, namespace: str, name: str, given: Given) -> Stored:
    """Put an adapter as the newest version of its name, which can be repeated whatever came of it.

    Raises:
        ApiError: it was not stored, or is not known to be; with why.

    """
    adapters, seconds = service.adapters, service.settings.max_seconds
    until = asyncio.get_running_loop().time() + seconds
    async with AsyncExitStack() as held:
        try:
            async with asyncio.timeout_at(until):
                lane = await held.enter_async_context(service.putting.lane(namespace))
        except TimeoutError:
            told = f"other puts of {namespace!r} have taken its turn for {seconds:g} s; nothing was stored; try again"
            raise ApiError(503, told, retry_after=5) from None
        told = f"the adapter could not be checked within {seconds:g} s; nothing was stored; try again"
        late = ApiError(504, told, retry_after=5)
        on = None if given.on is None else await _settled(lane, adapters, namespace, given.on, until, late)
        own = service.prompts.own
        contents = await _step(lane, lambda: _checked(adapters, own, namespace, name, given, on), until, late)
        version, created = await _keep(lane, adapters, namespace, name, contents, given, on)
        return Stored(version, created, await _load(lane, adapters, AdapterKey.of(namespace, version)))


async def _settled(
    lane: Lane, adapters: Catalogue, namespace: str, on: str, until: float, late: ApiError
) -> SharedVersion:
    """The shared version that is put on top of; one that is not there, or cannot be stood on, is a bad request."""
    try:
        return await _step(lane, lambda: adapters.settle(namespace, on), until, late)
    except (AdapterError, CheckpointError, ConfigError) as error:
        raise ApiError(400, str(error), param="on") from error


async def _step(lane: Lane, call: Callable[[], T], until: float, late: ApiError) -> T:
    try:
        async with asyncio.timeout_at(until):
            return await lane.run(call)
    except TimeoutError:
        raise late from None


def _checked(
    adapters: Catalogue, own: OwnFiles, namespace: str, name: str, given: Given, on: SharedVersion | None
) -> Contents:
    """In a thread, which takes its folder away itself: nobody else knows when it has ended."""
    folder = folder_for_put()
    try:
        given.bring(folder)
        _check_own(own, name, folder)
        return adapters.check(namespace, name, folder, on)
    except KilotuneError as error:
        made = _refused(error)
        message = made.message.replace(f"{folder}/", "")
        raise ApiError(made.status, message, param=made.param, code=made.code, headers=made.headers) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_own(own: OwnFiles, name: str, folder: Path) -> None:
    """What it brings beside its two files is the base's, or is served; before anything slow is done for it."""
    try:
        if files := read_own(folder):
            own.check(name, files)
    except (CheckpointError, ConfigError) as error:
        raise ApiError(400, str(error), param="files") from error


def folder_for_put() -> Path:
    """A new folder in which an adapter is looked at before it goes into the store."""
    try:
        return Path(tempfile.mkdtemp(prefix="kilotune-put-"))
    except OSError as error:
        raise ApiError(507, f"the adapter cannot be kept: {error.strerror}") from error


def uploaded(
    config: BinaryIO, weights: BinaryIO, files: Mapping[str, BinaryIO] | None = None
) -> Callable[[Path], None]:
    """Of two files that are open at their beginning, and others by name, what writes them into a folder."""

    def bring(folder: Path) -> None:
        copied(config, folder / CONFIG_NAME)
        copied(weights, folder / WEIGHTS_NAME)
        for name, file in (files or {}).items():
            copied(file, folder / name)

    return bring


def copied(source: BinaryIO, place: Path) -> None:
    """Write the rest of a file to a place.

    Raises:
        ApiError: there is no room.

    """
    try:
        with place.open("wb") as out:
            shutil.copyfileobj(source, out, CHUNK)
    except OSError as error:
        raise ApiError(507, f"the adapter cannot be kept: {error.strerror}") from error


async def _keep(
    lane: Lane,
    adapters: Catalogue,
    namespace: str,
    name: str,
    contents: Contents,
    given: Given,
    on: SharedVersion | None,
) -> tuple[Version, bool]:
    def keep() -> tuple[Version, bool]:
        return adapters.keep(
            namespace, name, contents, metadata=given.metadata, tags=given.tags, alias=given.alias, on=on
        )

    told = f"the store of adapters has not answered within {KEEPING:g} s: the adapter is stored or not; put it again"
    late = ApiError(503, told, code="store_unavailable", retry_after=5)
    try:
        return await _step(lane, keep, asyncio.get_running_loop().time() + KEEPING, late)
    except KilotuneError as error:
        raise _refused(error) from error


def _refused(error: KilotuneError) -> ApiError:
    """A put looks nothing up: a name that it may not have is a bad request."""
    return ApiError(400, str(error), param="name") if isinstance(error, AdapterError) else of_library(error)


async def _load(lane: Lane, adapters: Catalogue, key: AdapterKey) -> str | None:
    """Why a version that is stored does not answer yet."""
    try:
        async with asyncio.timeout(PATIENCE):
            await lane.run(lambda: adapters.load(key))
    except TimeoutError:
        return f"it has not been read back within {PATIENCE:g} s"
    except KilotuneError as error:
        return of_library(error).message
    except Exception as error:
        log("failed", level=40, failed=error, namespace=key.namespace, name=key.name, version=key.version)
        return "reading it back failed; the log says more"
    return None
