"""When whose feedback is learned: one document for each user, which a server takes when it is due.

::

    wake ─► queued, due after the pause ─claim─► running ─► rests, or parked until the rules change
              ▲      more feedback moves the pause │  │        │
              └────── feedback came meanwhile ─────┘  │        │
              └──────────────── wake ─────────────────┼────────┘
                                                      └─ a server that dies loses its claim: another one goes on

What was learned, refused or taken back is told by events, which belong to that document.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from ...errors import AdapterError
from ...fleet.store.documents import Document, Documents
from .jobs import HELD

__all__ = ["LEARNING", "LEARNING_EVENT", "Turn", "events", "noted", "notes_of", "tell", "turn_name", "wake", "wake_all"]

LEARNING, LEARNING_EVENT = "learning", "learningevent"
WAITING, RUNNING, RESTING = "queued", "running", "rests"
PARKED = "parked"  # there is something to learn, which the rules of the namespace keep from being learned
EVENTS = 200  # of a user that are kept
MOST_PAUSES = 10  # feedback that does not end puts learning off for so many pauses, and no longer


def turn_name(namespace: str, user: str) -> str:
    """What the document of a user is called; of no two the same, and it tells neither."""
    return f"learning-{hashlib.sha256(json.dumps([namespace, user]).encode()).hexdigest()}"


def wake(documents: Documents, user: str, after: float) -> None:
    """Have a user's feedback learned ``after`` seconds from now; later where more comes meanwhile.

    Args:
        documents: of the namespace.
        user: whose feedback has changed.
        after: the pause, in seconds; 0: at once.

    """
    now = time.time()

    def due(found: Document | None) -> Document:
        if found is None:
            data = {"user": user, "since": now, "next": None}
            return Document(LEARNING, "", "", data, state=WAITING, until=now + after)
        if found.state in (RUNNING, HELD):  # what it does not see is for a run behind it
            return replace(found, data={**found.data, "next": now + after})
        since = found.data["since"] if found.state == WAITING else now
        until = min(now + after, since + MOST_PAUSES * after)
        return replace(found, state=WAITING, owner=None, until=until, data={**found.data, "since": since})

    documents.put(LEARNING, _name(documents, user), due)


def wake_all(documents: Documents, after: float, rested: bool = False) -> int:
    """Have all learned that is kept waiting by the rules; how many users that are.

    Args:
        documents: of the namespace.
        after: in so many seconds.
        rested: of the others, too: what they have learned is to stand on something else.

    """
    states = (PARKED, RESTING) if rested else (PARKED,)
    return documents.move(LEARNING, states, WAITING, time.time() + after)


def events(documents: Documents, user: str, *, after: str | None = None, limit: int = 20) -> list[Document]:
    """What became of a user's feedback, the newest first.

    ``data`` of each: ``type`` ("learned", "refused", "rolled_back", "taken_back", "skipped", "waits", "failed"),
    ``message`` in words, and ``data``: the version, the lessons' names, what the gate measured.

    Args:
        documents: of the namespace.
        user: whose.
        after: an event's name; those behind it.
        limit: at most so many.

    """
    return documents.ls(LEARNING_EVENT, parent=_name(documents, user), newest=True, after=after, limit=limit)


def tell(documents: Documents, user: str, what: str, message: str, data: Mapping[str, Any] | None = None) -> None:
    """An event of a user; nothing where the user was forgotten meanwhile. The oldest go."""
    told = {"type": what, "message": message, "data": dict(data or {})}
    try:
        documents.add(LEARNING_EVENT, told, parent=_name(documents, user), prefix="learned")
    except AdapterError:
        return
    for one in events(documents, user, limit=EVENTS + 10)[EVENTS:]:
        documents.rm(LEARNING_EVENT, one.name)


def notes_of(documents: Documents, user: str, what: str) -> list[Any]:
    """What is remembered of a user's learning: ``aside``, ``left``, ``skipped``, ``told``; empty: nothing is."""
    found = documents.find(LEARNING, _name(documents, user))
    return [] if found is None else list(found.data.get(what, []))


def noted(documents: Documents, user: str, what: str, values: Sequence[Any]) -> None:
    """Remember something of a user's learning, whoever is at work on it."""
    documents.change(
        LEARNING, _name(documents, user), lambda found: replace(found, data={**found.data, what: list(values)})
    )


def _name(documents: Documents, user: str) -> str:
    assert documents.namespace is not None, "feedback belongs to a namespace"
    return turn_name(documents.namespace, user)


@final
class Turn:
    """A user's turn, as long as ``owner`` has it.

    Args:
        documents: of the namespace.
        document: as it was claimed.

    """

    def __init__(self, documents: Documents, document: Document) -> None:
        self.documents, self.name, self.owner = documents, document.name, document.owner
        self.user: str = document.data["user"]

    def mine(self) -> bool:
        """Whether it is still so."""
        found = self.documents.find(LEARNING, self.name)
        return found is not None and self._own(found)

    def notes(self, what: str) -> list[Any]:
        """See :func:`notes_of`."""
        return notes_of(self.documents, self.user, what)

    def note(self, what: str, values: Sequence[Any]) -> None:
        """See :func:`noted`; writes only what is new."""
        if self.notes(what) != list(values):
            noted(self.documents, self.user, what, values)

    def end(self, more: bool = False, parked: bool = False) -> None:
        """It is done: rest, or wait for what came meanwhile. more: not all was learned. parked: the rules forbid it."""

        def over(found: Document) -> Document:
            following = found.data["next"]
            if following is None and more:
                following = time.time()
            state = (PARKED if parked else RESTING) if following is None else WAITING
            data = {**found.data, "next": None, "since": time.time()}
            return replace(found, state=state, owner=None, until=following, data=data)

        self._change(over)

    def again(self, after: float) -> None:
        """It could not be done now: try again in so many seconds."""
        until = time.time() + after
        self._change(lambda found: replace(found, state=WAITING, owner=None, until=until))

    def _own(self, found: Document) -> bool:
        return found.state == RUNNING and found.owner == self.owner

    def _change(self, change: Callable[[Document], Document]) -> None:
        self.documents.change(LEARNING, self.name, lambda found: change(found) if self._own(found) else found)
