"""Threads that take documents of a kind, one each, and give signs of life for them while they work.

What a server has taken is its own for as long as it gives signs of life; then another server takes it.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import final

from ...errors import KilotuneError, first_line
from ...fleet.store.documents import Document, Documents
from ..engine.cores import compute_alone

__all__ = ["Claim", "LeftError", "Workers"]

LEASE = 15.0  # seconds without a sign of life after which another server takes a document
ALIVE = 3.0  # seconds between signs of life
POLL = 0.25  # seconds between looks for documents
CLAIMED = 16  # documents that are taken at once
log = logging.getLogger("kilotune.serve")


@final
class LeftError(Exception):
    """The work is not to go on here: cancelled, deleted, taken over, or the server ends."""


@final
class Claim:
    """A document that is worked on here. lost: somebody else has it."""

    def __init__(self, workers: Workers, document: Document) -> None:
        self._workers, self.document = workers, document
        self.lost = False

    @property
    def over(self) -> bool:
        """Whether the work is to end here, for whoever goes on with it."""
        return self.lost or self._workers.stopping

    @property
    def owner(self) -> str:
        """Whose it is: each claim's own, so that who took it before, and be it here, has it no more."""
        return self.document.owner or ""


@final
class Workers:
    """Works on documents of one kind.

    Args:
        documents: of all namespaces.
        kind: which are taken.
        work: does it; a LeftError is no failure.
        at_once: documents that are worked on at once here.
        beside: is called between signs of life.

    """

    def __init__(
        self,
        documents: Documents,
        kind: str,
        work: Callable[[Claim], None],
        at_once: int,
        beside: Callable[[], object] | None = None,
    ) -> None:
        self._documents, self._kind, self._work, self._beside = documents, kind, work, beside
        self._stopping = threading.Event()
        self._places = threading.Semaphore(at_once)
        self._pool = ThreadPoolExecutor(at_once, f"kilotune-{kind}", initializer=compute_alone)
        self._claims: set[Claim] = set()
        self._threads: list[threading.Thread] = []

    @property
    def stopping(self) -> bool:
        """Whether the server ends."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Begin to look for documents."""
        for what in (self._look, self._live):
            thread = threading.Thread(target=what, name=f"kilotune-{self._kind}{what.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Leave all documents where they are; another server, or the next start, goes on with them."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown(wait=True)

    def _live(self) -> None:
        """Give signs of life, whatever the passes of training wait for."""
        while not self._stopping.wait(ALIVE):
            try:
                if claims := list(self._claims):
                    for claim in self._documents.together(partial(self._renew, claims=claims)):
                        claim.lost = True
                if self._beside is not None:
                    self._beside()
            except KilotuneError as error:
                log.warning("no signs of life can be given (%s): %s", self._kind, first_line(error))

    def _renew(self, own: Documents, claims: list[Claim]) -> list[Claim]:
        """Those that somebody else has."""
        return [one for one in claims if not own.renew(self._kind, one.document.name, one.owner, LEASE)]

    def _look(self) -> None:
        while not self._stopping.is_set():
            if not self._places.acquire(timeout=POLL):
                continue
            places, found = 1, []
            while places < CLAIMED and self._places.acquire(blocking=False):
                places += 1
            try:
                found = self._documents.together(partial(self._claim, places=places))
            except KilotuneError as error:
                log.warning("nothing can be looked for (%s): %s", self._kind, first_line(error))
            for one in found:
                self._pool.submit(self._run, one)
            if left := places - len(found):
                self._places.release(left)
            if not found:
                self._stopping.wait(POLL)

    def _claim(self, own: Documents, places: int) -> list[Document]:
        """Take as many documents as there are places for."""
        found: list[Document] = []
        while len(found) < places and (one := own.claim(self._kind, uuid.uuid4().hex, LEASE)) is not None:
            found.append(one)
        return found

    def _run(self, found: Document) -> None:
        claim = Claim(self, found)
        self._claims.add(claim)
        try:
            self._work(claim)
        except LeftError:
            pass
        except Exception:
            log.exception("a %s could not be ended; it is tried again", self._kind)
        finally:
            self._claims.discard(claim)
            self._let_go(claim)
            self._places.release()

    def _let_go(self, claim: Claim) -> None:
        """Of a document that was taken away from this work, say that nothing of it goes on here."""

        def left(one: Document) -> Document:
            mine = one.owner == claim.owner and one.state != "running"
            return replace(one, owner=None, until=None) if mine else one

        kind, name = self._kind, claim.document.name
        with suppress(KilotuneError):  # the claim runs out
            now = self._documents.find(kind, name)
            if now is not None and left(now) is not now:  # seldom, and only then is there something to write
                self._documents.change(kind, name, left)
