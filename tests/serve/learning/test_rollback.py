"""The way back: by hand, and by itself where several users' ratings say so; never to what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import fisher_exact

from kilotune.errors import AdapterError
from kilotune.fleet.store import Version, open_store
from kilotune.fleet.store.documents import Documents
from kilotune.serve.learning.feedback import Answered, Feedback, Said
from kilotune.serve.learning.jobs import JOB
from kilotune.serve.learning.lessons import mark_of
from kilotune.serve.learning.rollback import (
    Rated,
    RollbackRule,
    fisher,
    marks_of,
    packed,
    roll_back,
    shared_in,
    watch,
    worse,
)
from kilotune.serve.learning.turns import events, notes_of, wake
from kilotune.serve.learning.users import LIVE, model_of

RULE = RollbackRule(users=5, chance=0.05, cool_down=3600)


def version(number: int, name: str = "personal:u", **metadata: Any) -> Version:
    now = datetime.now(UTC)
    return Version(name, number, f"{number}", now, None, metadata, (), "float32", 1, "f", None)


class Catalogue:
    """Versions and aliases of one namespace."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Version]] = {}
        self.named: dict[str, dict[str, int]] = {}

    def add(self, name: str, *versions: Version, live: int) -> None:
        self.kept[name], self.named[name] = list(versions), {LIVE: live}

    def versions(self, namespace: str, name: str) -> list[Version]:
        return self.kept.get(name, [])

    def aliases(self, namespace: str, name: str) -> dict[str, int]:
        return dict(self.named[name])

    def roll_out(self, namespace: str, alias: str, versions: Mapping[str, int]) -> dict[str, int]:
        for name, number in versions.items():
            self.named[name][alias] = number
        return dict(versions)

    def unalias(self, namespace: str, name: str, alias: str) -> None:
        del self.named[name][alias]


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Documents]:
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        yield Documents(store, "ann")


def taught(space: Documents, user: str, count: int) -> list[str]:
    """Marks of so many corrections."""
    feedback = Feedback(space)
    for number in range(count):
        answer = feedback.keep(Answered(user=user, messages=[], tools=None, text="x", model="base"), 60)
        assert answer is not None
        feedback.add(user, Said(answer=answer.name, correction=f"right {number}"))
    wake(space, user, 0)
    return [mark_of(one) for one in feedback.lessons(user)]


def aside(space: Documents, user: str) -> set[str]:
    """Marks of what is set aside."""
    names = notes_of(space, user, "aside")
    return {mark_of(one) for one in Feedback(space).lessons(user) if one.name in names}


# -- by hand --------------------------------------------------------------------------------------------------


def test_one_goes_back_version_by_version_and_then_to_what_is_beneath(space: Documents) -> None:
    a, b, c = taught(space, "u", 3)
    made = Catalogue()
    kept = [version(1, lessons=packed([a])), version(2, lessons=packed([a, b])), version(3, lessons=packed([a, b, c]))]
    made.add(model_of("u"), *kept, live=3)
    assert roll_back(space, made, "u") == kept[1]
    assert aside(space, "u") == {c}
    assert roll_back(space, made, "u") == kept[0]
    assert made.named[model_of("u")] == {LIVE: 1}
    assert roll_back(space, made, "u") is None
    assert made.named[model_of("u")] == {}
    assert aside(space, "u") == {a, b, c}
    with pytest.raises(AdapterError, match="nothing that you taught is live"):
        roll_back(space, made, "u")
    told = [(one.data["data"]["from"], one.data["data"]["to"]) for one in events(space, "u")]
    assert told == [(1, None), (2, 1), (3, 2)]


def test_no_way_leads_to_what_was_forgotten_refused_or_left(space: Documents) -> None:
    a, b = taught(space, "u", 2)
    made = Catalogue()
    gone = "0" * len(a)
    kept = [
        version(1, lessons=packed([a])),
        version(2, lessons=packed([a, gone])),
        version(3, lessons=packed([a, b]), refused=["because"]),
        version(4, lessons=packed([a, b])),
    ]
    made.add(model_of("u"), *kept, live=4)
    assert roll_back(space, made, "u") == kept[0]
    made.add(model_of("u"), *kept, version(5, lessons=packed([a, b])), live=5)  # learned again after that
    assert roll_back(space, made, "u") == kept[0]  # not to 4, which was gone back from


def test_marks_are_read_back() -> None:
    marks = [f"{number:012x}" for number in range(50)]
    assert marks_of(version(1, lessons=packed(marks))) == set(marks)
    assert marks_of(version(1)) == set()


# -- by itself --------------------------------------------------------------------------------------------------


def test_fishers_exact_test_is_scipys() -> None:
    draws = np.random.default_rng(0)
    for _ in range(200):
        good, bad, before, bad_before = (int(n) for n in draws.integers(0, 12, 4))
        expected = fisher_exact([[good, bad], [before, bad_before]], alternative="less").pvalue
        assert fisher(good, bad, before, bad_before) == pytest.approx(expected, abs=1e-12)


def ratings(version: int, good: int, bad: int, first: int = 0) -> list[Rated]:
    return [Rated(f"u{first + i}", version, i < good) for i in range(good + bad)]


def test_it_takes_several_users_and_a_difference_that_is_no_chance() -> None:
    before = ratings(1, 9, 1)
    found = worse([*before, *ratings(2, 1, 9)], 2, 1, RULE)
    assert found is not None
    assert (found.newer, found.older) == ((1, 10), (9, 10))
    assert found.chance == pytest.approx(fisher_exact([[1, 9], [9, 1]], alternative="less").pvalue)
    assert worse([*before, *ratings(2, 7, 3)], 2, 1, RULE) is None  # chance
    assert worse([*before, *ratings(2, 10, 0)], 2, 1, RULE) is None  # better
    assert worse([*before, *ratings(2, 0, 4)], 2, 1, RULE) is None  # four users
    assert worse([*ratings(1, 4, 0), *ratings(2, 0, 20)], 2, 1, RULE) is None  # four of the older one
    one = [Rated("mallory", 2, False)] * 100
    assert worse([*before, *one, *ratings(2, 4, 0)], 2, 1, RULE) is None  # one voice, however loud


def rated(space: Documents, user: str, up: bool, version: int) -> None:
    feedback = Feedback(space)
    told = Answered(user=user, messages=[], tools=None, text="x", model="base", on=f"ann/house/{version}")
    answer = feedback.keep(told, 60)
    assert answer is not None
    feedback.add(user, Said(answer=answer.name, rating=up))


def test_a_shared_adapter_goes_back_once_and_then_cools_down(space: Documents) -> None:
    made = Catalogue()
    made.add("house", *(version(number, "house") for number in (1, 2, 3)), live=2)
    for number in range(8):
        rated(space, f"u{number}", True, 1)
        rated(space, f"u{number}", False, 2)
    assert watch(space, made, RULE, ["house", "nobody"]) == ["house"]
    assert made.named["house"] == {LIVE: 1}
    made.named["house"][LIVE] = 2  # somebody moves it on again
    assert watch(space, made, RULE, ["house"]) == []
    assert watch(space, made, RollbackRule(users=5, chance=0.05, cool_down=0), ["house"]) == ["house"]


def test_it_does_not_go_back_to_what_was_trained_by_a_job_that_is_gone(space: Documents) -> None:
    made = Catalogue()
    job = space.add(JOB, {})
    made.add("house", version(1, "house", job=job.name), version(2, "house", job="ftjob-gone"), version(3), live=3)
    for number in range(8):
        rated(space, f"u{number}", True, 2)
        rated(space, f"u{number}", True, 1)
        rated(space, f"u{number}", False, 3)
    assert watch(space, made, RULE, ["house"]) == ["house"]
    assert made.named["house"] == {LIVE: 1}


def test_what_an_answer_came_of(space: Documents) -> None:
    assert shared_in(space, "personal:u", 3, "ann/house/2") == ("house", 2)
    assert shared_in(space, "house", 2, None) == ("house", 2)
    assert shared_in(space, "personal:u", 3, None) is None
    assert shared_in(space, "personal:u", 3, "@shared/house/2") is None  # its owner's, not this namespace's
    assert shared_in(space, "base", None, None) is None
