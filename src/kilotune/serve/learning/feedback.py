"""What users say of answers: answers that are kept for a while, and what was said of them, which stays.

Documents of a namespace (:mod:`~kilotune.fleet.store.documents`)::

    feedbackrules   one: whether there is feedback at all, and how long answers are kept. None: there is none
    person          one for each user; answers and feedback belong to it and go when it goes
    answer          what was answered, to what, by which version; gone at its ``until``
    feedback        what its user said of an answer, with a copy of it; its state is the answer's name

Of an answer there is one piece of feedback. A new one takes its place under a new name: what was learned from a name
is known by it, and the old one counts as taken back.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, final

from ...errors import AdapterError, ConfigError
from ...fleet.store.documents import Document, Documents, QuotaError
from .turns import wake_all

__all__ = [
    "ANSWER",
    "FEEDBACK",
    "PERSON",
    "RULES",
    "Answered",
    "Feedback",
    "FeedbackLimits",
    "FeedbackRules",
    "Lesson",
    "Room",
    "Said",
]

ANSWER, FEEDBACK, PERSON, RULES = "answer", "feedback", "person", "feedbackrules"
PAGE = 200  # documents that are read at once
ROOM = 0.9  # of what answers may take, that is left once the oldest had to go
KNOWN = 65_536  # namespaces and users of which is known what room they have
COUNTED = 16  # a part of what answers may take, after which they are counted again: other servers keep some, too


@final
@dataclass(frozen=True, kw_only=True)
class FeedbackRules:
    """Of a namespace.

    Args:
        enabled: whether answers are kept and feedback is taken.
        keep_seconds: how long answers are kept.
        pause_seconds: how long learning waits after the last piece of feedback of a user.
        model: what personal models stand on: None: the base; a shared adapter, as NAME, NAME/3 or NAME/alias.
        scope: what a personal model answers: "near": what is near the questions that its user gave feedback on, and
            all else is answered by what it stands on; "all": everything.

    """

    enabled: bool = False
    keep_seconds: float = 7 * 86_400.0
    pause_seconds: float = 30.0
    model: str | None = None
    scope: Literal["near", "all"] = "near"


@final
@dataclass(frozen=True, kw_only=True)
class FeedbackLimits:
    """What a namespace may have. answer_bytes: of answers that are kept, beyond which the oldest go; feedback may take
    as much, and is refused beyond it. text: bytes of a correction. pieces: of feedback of one user.
    share: of those bytes that one user may have, so that nobody takes the room of all."""

    answer_bytes: int = 2**28
    text: int = 65_536
    pieces: int = 4096
    share: float = 0.125

    @property
    def user_bytes(self) -> int:
        """Of one user's answers, or of their feedback."""
        return int(self.answer_bytes * self.share)


@final
@dataclass(frozen=True, kw_only=True)
class Answered:
    """An answer, as it was given.

    Args:
        user: whom.
        messages: the prompt, as the request had it.
        tools: of the request.
        text: all of the answer.
        model: what answered: an adapter's name, or what requests call the base.
        version: of the adapter; None: the base.
        on: what the adapter stood on, as NAMESPACE/NAME/VERSION; None: the base.

    """

    user: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    text: str
    model: str
    version: int | str | None = None
    on: str | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Said:
    """What a user says of an answer: one of the three. better_than: another answer to the same prompt, the worse."""

    answer: str
    rating: bool | None = None
    correction: str | None = None
    better_than: str | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One piece of feedback, as learning reads it.

    Args:
        name: of its document; feedback that is replaced has another one.
        user: whose.
        kind: "rating", "correction" or "choice".
        messages: the prompt, as the request had it.
        tools: of the request.
        answer: what was answered; of a choice, the worse.
        better: of a correction, the right answer; of a choice, the better one.
        rating: whether it was good.
        model: what answered; version: of the adapter, None: the base; on: what that stood on, NAMESPACE/NAME/VERSION.
        created: seconds since 1970.

    """

    name: str
    user: str
    kind: str
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    answer: str
    better: str | None
    rating: bool | None
    model: str
    version: int | str | None
    on: str | None = field(default=None)
    created: float


@final
class Room:
    """What may be kept in each namespace before its answers are counted again: to count many takes a while."""

    def __init__(self) -> None:
        self._free: dict[tuple[str, str | None], int] = {}
        self._lock = threading.Lock()

    def make(self, documents: Documents, size: int, most: int, person: str | None = None) -> None:
        """Have room for so many bytes among those that answers may take; the oldest go where there is none.

        person: to whom they belong, whose answers may take so much; None: all of the namespace.
        """
        assert documents.namespace is not None, "answers belong to a namespace"
        place = documents.namespace, person
        if self._take(place, size):
            return
        _, there = documents.total(ANSWER, parent=person)
        if there + size > most:
            documents.shrink(ANSWER, int(most * ROOM) - size, parent=person)
            _, there = documents.total(ANSWER, parent=person)
        with self._lock:
            if len(self._free) >= KNOWN:
                self._free.clear()  # they are counted again
            self._free[place] = min(most - there, most // COUNTED) - size

    def _take(self, place: tuple[str, str | None], size: int) -> bool:
        with self._lock:
            free = self._free.get(place, 0) - size
            if free >= 0:
                self._free[place] = free
            return free >= 0


@final
class Feedback:
    """The feedback of one namespace. All methods wait for the store.

    Args:
        documents: of the namespace.
        limits: of it.
        clock: seconds since 1970.
        room: what a server knows of the answers that it keeps; None: nothing yet.

    """

    def __init__(
        self,
        documents: Documents,
        limits: FeedbackLimits | None = None,
        clock: Callable[[], float] = time.time,
        room: Room | None = None,
    ) -> None:
        self.documents, self.limits, self._clock = documents, limits or FeedbackLimits(), clock
        self._room = room or Room()

    # -- rules -----------------------------------------------------------------------------------

    def rules(self) -> FeedbackRules:
        """Those that hold."""
        found = self.documents.ls(RULES, newest=True, limit=1)
        return FeedbackRules(**found[0].data) if found else FeedbackRules()

    def taken(self) -> bool:
        """Whether answers are kept and feedback is taken, at this moment."""
        found = self.documents.ls(RULES, newest=True, limit=1)
        return bool(found) and bool(found[0].data["enabled"])

    def set_rules(self, rules: FeedbackRules) -> None:
        """From now on these. Where there is to be no feedback any more, kept answers are removed; feedback stays.

        What was given and could not be learned by the rules before is learned by these; all, where models are to stand
        on something else.
        """
        moved = self.rules().model != rules.model
        self.documents.swap(RULES, asdict(rules))
        if rules.enabled:
            wake_all(self.documents, rules.pause_seconds, rested=moved)
        if not rules.enabled:
            self.documents.shrink(ANSWER, 0)

    # -- answers ---------------------------------------------------------------------------------

    def keep(self, one: Answered, seconds: float) -> Document | None:
        """Keep an answer for so long; None where it alone is more than all of a user's may be. The oldest make room."""
        told = {"user": one.user, "model": one.model, "version": one.version, "on": one.on}
        body = [_packed({"messages": one.messages, "tools": one.tools, "answer": one.text})]
        size, most, until = len(body[0]), self.limits.user_bytes, self._clock() + seconds
        if size > most * ROOM:
            return None
        self._room.make(self.documents, size, most, self.person(one.user))
        self._room.make(self.documents, size, self.limits.answer_bytes)
        while True:
            person = self._person(one.user)
            try:
                return self.documents.add(ANSWER, told, parent=person, until=until, body=body)
            except AdapterError:  # the person was forgotten just now
                continue

    def answer(self, name: str, user: str) -> tuple[Document, dict[str, Any]]:
        """An answer of this user's that is still kept, and what is in it.

        Raises:
            AdapterError: there is none; which is all that is told of others'.

        """
        found = self.documents.find(ANSWER, name)
        mine = found is not None and found.data["user"] == user and (found.until or 0) > self._clock()
        if found is not None and mine and (kept := self._body(ANSWER, name)) is not None:
            return found, kept
        raise AdapterError(f"there is no answer {name!r:.100} of yours; answers are kept for a time only")

    # -- feedback --------------------------------------------------------------------------------

    def add(self, user: str, said: Said) -> tuple[Document, bool]:
        """Keep what a user says of an answer, in place of what was said of it before; (it, whether there was).

        Raises:
            AdapterError: the user has no such answer. ConfigError: it says nothing, or too much. QuotaError: the
                namespace or the user has all the feedback that they may have.

        """
        self.check(said)
        answer, kept = self.answer(said.answer, user)
        kind, better = "rating", None
        if said.correction is not None:
            kind, better = "correction", said.correction
        elif said.better_than is not None:
            kind, better = "choice", kept["answer"]
            _, other = self.answer(said.better_than, user)
            if any(other[key] != kept[key] for key in ("messages", "tools")):
                raise ConfigError(f"better_than: {said.better_than!r} answers another prompt than {said.answer!r}")
            kept = other
        if better == kept["answer"]:
            raise ConfigError(
                "correction: is what was answered; rate it up instead"
                if kind == "correction"
                else "better_than: both answers have the same text"
            )
        told = {
            **answer.data,
            "answer": said.answer,
            "kind": kind,
            "rating": said.rating,
            "better_than": said.better_than,
        }
        person = self._person(user)
        body = [_packed({**kept, "better": better})]
        self._check_room(person, said.answer, len(body[0]))
        made, replaced = self.documents.swap(
            FEEDBACK, told, parent=person, state=said.answer, body=body, quota=self.limits.answer_bytes
        )
        if said.better_than is not None:
            replaced |= self._turn_about(said, person)
        return made, replaced

    def _check_room(self, person: str, answer: str, size: int) -> None:
        """See that a user may have one more piece of feedback, in place of what there is of the answer."""
        count, there = self.documents.total(FEEDBACK, parent=person)
        limits = self.limits
        if count < limits.pieces and there + size <= limits.user_bytes:
            return
        before = self.documents.ls(FEEDBACK, parent=person, state=answer)
        count, there = count - len(before), there - sum(one.size for one in before)
        if count >= limits.pieces or there + size > limits.user_bytes:
            raise QuotaError(
                f"feedback: you have given {count} pieces of {there} bytes; {limits.pieces} of {limits.user_bytes} "
                "bytes is the most. Take some of it back"
            )

    def _turn_about(self, said: Said, person: str) -> bool:
        """Take back that the worse one was the better one; whether that was said."""
        before = self.documents.ls(FEEDBACK, parent=person, state=said.better_than)
        opposite = [one.name for one in before if one.data["better_than"] == said.answer]
        return sum(self.documents.rm(FEEDBACK, name) for name in opposite) > 0

    def check(self, said: Said) -> None:
        """See that it says one thing, and not too much.

        Raises:
            ConfigError: it does not.

        """
        given = [name for name in ("rating", "correction", "better_than") if getattr(said, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"expected one of rating, correction and better_than, got {', '.join(given) or 'none'}")
        if said.better_than == said.answer:
            raise ConfigError("better_than: expected another answer than the one that is better")
        if said.correction is None:
            return
        try:
            size = len(said.correction.encode())
        except UnicodeEncodeError:
            raise ConfigError("correction: holds half of a surrogate pair, which is no character") from None
        if not said.correction.strip():
            raise ConfigError("correction: is empty; rate the answer down instead")
        if size > self.limits.text:
            raise ConfigError(f"correction: {size} bytes; at most {self.limits.text} are taken")

    def find(self, name: str, user: str) -> Document:
        """One piece of feedback of this user's.

        Raises:
            AdapterError: there is none.

        """
        found = self.documents.find(FEEDBACK, name)
        if found is None or found.data["user"] != user:
            raise AdapterError(f"there is no feedback {name!r:.100} of yours")
        return found

    def ls(self, user: str, *, after: str | None = None, newest: bool = True, limit: int = 100) -> list[Document]:
        """A user's feedback, a page of it."""
        return self.documents.ls(FEEDBACK, parent=self.person(user), after=after, newest=newest, limit=limit)

    def remove(self, name: str, user: str) -> None:
        """Take one back.

        Raises:
            AdapterError: there is none.

        """
        self.find(name, user)
        self.documents.rm(FEEDBACK, name)

    # -- what learning reads -----------------------------------------------------------------------

    def person(self, user: str) -> str:
        """The name of a user's document, to which all belongs that is kept of them; there may be none yet."""
        assert self.documents.namespace is not None, "feedback belongs to a namespace"
        words = json.dumps([self.documents.namespace, user])
        return f"{PERSON}-{hashlib.sha256(words.encode()).hexdigest()}"

    def _person(self, user: str) -> str:
        """The same, of one that is there."""
        name = self.person(user)
        if self.documents.find(PERSON, name) is None:
            self.documents.put(PERSON, name, lambda found: found or Document("", "", "", {"user": user}))
        return name

    def lesson(self, one: Document) -> Lesson | None:
        """A piece of feedback with its texts; None where it went just now."""
        kept = self._body(FEEDBACK, one.name)
        if kept is None:
            return None
        told = {key: one.data[key] for key in ("user", "kind", "rating", "model", "version", "on")}
        return Lesson(name=one.name, created=one.created, **told, **kept)

    def lessons(self, user: str) -> list[Lesson]:
        """All that stands, the oldest first."""
        return [lesson for one in self._all(user) if (lesson := self.lesson(one)) is not None]

    def _all(self, user: str) -> Iterator[Document]:
        after: str | None = None
        while page := self.ls(user, after=after, newest=False, limit=PAGE):
            yield from page
            after = page[-1].name

    def _body(self, kind: str, name: str) -> dict[str, Any] | None:
        data = b"".join(self.documents.body(kind, name))
        return json.loads(data.decode("utf-8", "surrogatepass")) if data else None


def _packed(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "surrogatepass")  # of what a template leaves out
