"""The way back: which version a model goes back to, by a user's wish, or because others' ratings say so.

No way leads to a version that holds what was taken back, that the gate refused, or that was gone back from.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

from ...errors import AdapterError
from ...fleet.store import Version
from ...fleet.store.documents import Documents
from .feedback import FEEDBACK, Feedback
from .jobs import JOB
from .lessons import MARK, mark_of
from .turns import noted, notes_of, tell
from .users import LIVE, PERSONAL, model_of

__all__ = ["Rated", "RollbackRule", "Worse", "fisher", "marks_of", "packed", "roll_back", "shared_in", "watch", "worse"]

ROLLBACK = "rollback"  # documents: what went back by itself, and when
RATINGS = 5000  # of a namespace, the newest, that are looked at
PAGE = 500
log = logging.getLogger("kilotune.serve")


class Adapters(Protocol):
    """What has versions and aliases: an AdapterRegistry, or what stands for one."""

    def versions(self, namespace: str, name: str) -> list[Version]: ...
    def aliases(self, namespace: str, name: str) -> dict[str, int]: ...
    def roll_out(self, namespace: str, alias: str, versions: Mapping[str, int]) -> dict[str, int]: ...
    def unalias(self, namespace: str, name: str, alias: str) -> None: ...


# -- what a version holds ---------------------------------------------------------------------------------


def packed(marks: Sequence[str]) -> str:
    """Marks of lessons, as a version's metadata has them."""
    return "".join(marks)


def marks_of(version: Version) -> set[str]:
    """The marks of the lessons that a version has learned; none for one that learned from no feedback."""
    text = version.metadata.get("lessons")
    return {text[at : at + MARK] for at in range(0, len(text), MARK)} if isinstance(text, str) else set()


def _before(versions: Sequence[Version], live: int, fit: Callable[[Version], bool]) -> Version | None:
    """The newest version before ``live`` that may answer."""
    fits = [one for one in versions if one.version < live and "refused" not in one.metadata and fit(one)]
    return fits[-1] if fits else None


# -- by hand ------------------------------------------------------------------------------------------------


def roll_back(documents: Documents, adapters: Adapters, user: str) -> Version | None:
    """Have a user's model answer as the version before did; what only the newer one had learned is set aside.

    Args:
        documents: of the namespace.
        adapters: of the engine.
        user: whose.

    Returns:
        The version that is live now; None: there is none before, so what is beneath answers.

    Raises:
        AdapterError: nothing of this user's is live.

    """
    namespace, model = documents.namespace, model_of(user)
    assert namespace is not None, "feedback belongs to a namespace"
    versions = adapters.versions(namespace, model)
    live = adapters.aliases(namespace, model).get(LIVE) if versions else None
    if live is None:
        raise AdapterError("nothing that you taught is live, so there is nothing to go back from")
    lessons = {one.name: mark_of(one) for one in Feedback(documents).lessons(user)}
    standing = set(lessons.values())
    left = {*notes_of(documents, user, "left"), live}
    found = _before(versions, live, lambda one: one.version not in left and marks_of(one) <= standing)
    now = next(one for one in versions if one.version == live)
    aside = marks_of(now) - (set() if found is None else marks_of(found))
    noted(documents, user, "left", sorted(left))
    names = {*notes_of(documents, user, "aside"), *(name for name, mark in lessons.items() if mark in aside)}
    noted(documents, user, "aside", sorted(names & set(lessons)))
    if found is None:
        adapters.unalias(namespace, model, LIVE)
    else:
        adapters.roll_out(namespace, LIVE, {model: found.version})
    to = "what it stands on" if found is None else f"version {found.version}"
    data = {"from": live, "to": None if found is None else found.version, "by": "user"}
    tell(documents, user, "rolled_back", f"Your model went back from version {live} to {to}", data)
    return found


# -- by itself ------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, kw_only=True)
class RollbackRule:
    """When a shared adapter goes back by itself.

    Args:
        users: who rated the newer version, at least, and the older one.
        chance: that ratings as bad as these come of versions that are equally good, at most.
        cool_down: seconds in which the adapter does not go back again.

    """

    users: int = 5
    chance: float = 0.01
    cool_down: float = 86_400.0


@final
class Rated(NamedTuple):
    """What a user said of an answer. up: it was good."""

    user: str
    version: int
    up: bool


@final
class Worse(NamedTuple):
    """The newer version is worse. (users who find it good, all who rated it) of both; chance: see RollbackRule."""

    newer: tuple[int, int]
    older: tuple[int, int]
    chance: float


def fisher(good: int, bad: int, good_before: int, bad_before: int) -> float:
    """Fisher's exact test, one-sided: the chance of so few good ones among the first, if both are equally good."""
    first, all_good = good + bad, good + good_before
    total = first + good_before + bad_before
    ways = math.comb(total, first)
    least = max(0, first - (total - all_good))
    return sum(math.comb(all_good, k) * math.comb(total - all_good, first - k) for k in range(least, good + 1)) / ways


def worse(ratings: Iterable[Rated], newer: int, older: int, rule: RollbackRule) -> Worse | None:
    """Whether users find the newer version worse than the older one.

    Each user has one voice for a version, however often they rate: good where most of their ratings are.
    """
    voices: dict[tuple[int, str], int] = {}
    for one in ratings:
        key = one.version, one.user
        voices[key] = voices.get(key, 0) + (1 if one.up else -1)
    counts = []
    for version in (newer, older):
        own = [up for (of, _), up in voices.items() if of == version and up]
        counts.append((sum(up > 0 for up in own), len(own)))
    (good, many), (good_before, many_before) = counts
    if min(many, many_before) < rule.users or good * many_before >= good_before * many:
        return None
    chance = fisher(good, many - good, good_before, many_before - good_before)
    return Worse(counts[0], counts[1], chance) if chance <= rule.chance else None


def watch(documents: Documents, adapters: Adapters, rule: RollbackRule, names: Iterable[str]) -> list[str]:
    """Let shared adapters of a namespace go back whose newest version its users find worse; which did.

    Args:
        documents: of the namespace.
        adapters: of the engine.
        rule: see there.
        names: of adapters of the namespace, whose alias ``live`` is meant.

    """
    namespace = documents.namespace
    assert namespace is not None, "feedback belongs to a namespace"
    moved = []
    for name in sorted(set(names)):
        versions = adapters.versions(namespace, name)
        live = adapters.aliases(namespace, name).get(LIVE) if versions else None
        if live is None or _cools(documents, name, rule):
            continue
        older = _before(versions, live, lambda one: not _forgotten(documents, one))
        found = older and worse(_ratings(documents, name), live, older.version, rule)
        if not older or not found:
            continue
        adapters.roll_out(namespace, LIVE, {name: older.version})
        told = {"model": name, "from": live, "to": older.version, **found._asdict()}
        documents.add(ROLLBACK, told)
        log.warning("%s: %r went back from version %d to %d by its ratings", namespace, name, live, older.version)
        moved.append(name)
    return moved


def shared_in(documents: Documents, model: str, version: int | str | None, on: str | None) -> tuple[str, int] | None:
    """The adapter of this namespace, and its version, that an answer came of: it answered itself, or lay beneath."""
    space, _, rest = (on or "").partition("/")
    if space == documents.namespace and rest:
        name, _, number = rest.rpartition("/")
        return (name, int(number)) if number.isdecimal() else None
    if isinstance(version, int) and not model.startswith(f"{PERSONAL}:"):
        return model, version
    return None


def _ratings(documents: Documents, name: str) -> list[Rated]:
    found: list[Rated] = []
    after, seen = None, 0
    while seen < RATINGS and (page := documents.ls(FEEDBACK, newest=True, after=after, limit=PAGE)):
        after, seen = page[-1].name, seen + len(page)
        for one in page:
            place = shared_in(documents, one.data["model"], one.data["version"], one.data["on"])
            if one.data["kind"] == "rating" and place is not None and place[0] == name:
                found.append(Rated(one.data["user"], place[1], bool(one.data["rating"])))
    return found


def _cools(documents: Documents, name: str, rule: RollbackRule) -> bool:
    since = time.time() - rule.cool_down
    return any(one.data["model"] == name and one.created > since for one in documents.ls(ROLLBACK, newest=True))


def _forgotten(documents: Documents, version: Version) -> bool:
    """Whether a version came of a job that is not there any more: what it was trained on may have been forgotten."""
    job = version.metadata.get("job")
    return isinstance(job, str) and documents.find(JOB, job) is None
