"""Whose feedback is learned when: one run of a user at a time, after a pause, and again for what came meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kilotune.fleet.store import open_store
from kilotune.fleet.store.documents import Documents
from kilotune.serve.learning import turns
from kilotune.serve.learning.turns import LEARNING, Turn, events, tell, turn_name, wake, wake_all

START = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = START

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns, "time", made)
    return made


@pytest.fixture
def everyone(tmp_path: Path, clock: Clock) -> Iterator[Documents]:
    with open_store(f"sqlite:///{tmp_path}/a.db") as store:
        yield Documents(store, clock=clock.time)


def claimed(everyone: Documents, owner: str = "one") -> Turn | None:
    found = everyone.claim(LEARNING, owner, 15)
    return None if found is None else Turn(everyone.within(found.namespace), found)


def test_learning_begins_after_the_pause_and_more_feedback_puts_it_off(everyone: Documents, clock: Clock) -> None:
    ann = everyone.within("ann")
    wake(ann, "u", 30)
    clock.now += 20
    assert claimed(everyone) is None
    wake(ann, "u", 30)
    clock.now += 20  # 40 s after the first, 20 s after the second
    assert claimed(everyone) is None
    clock.now += 10
    turn = claimed(everyone)
    assert turn is not None
    assert turn.user == "u"
    assert claimed(everyone) is None  # one run of a user at a time
    turn.end()
    clock.now += 1000
    assert claimed(everyone) is None


def test_feedback_without_end_puts_it_off_for_ten_pauses_alone(everyone: Documents, clock: Clock) -> None:
    ann = everyone.within("ann")
    for _ in range(15):
        wake(ann, "u", 30)
        if claimed(everyone) is not None:
            break
        clock.now += 25
    assert clock.now - START == 300


def test_what_comes_during_a_run_makes_another_one(everyone: Documents, clock: Clock) -> None:
    ann = everyone.within("ann")
    wake(ann, "u", 0)
    turn = claimed(everyone)
    assert turn is not None
    wake(ann, "u", 30)
    assert turn.mine()
    assert claimed(everyone, "two") is None
    clock.now += 10
    turn.end()
    assert claimed(everyone) is None
    clock.now += 20
    following = claimed(everyone)
    assert following is not None
    following.end()
    clock.now += 1000
    assert claimed(everyone) is None


def test_a_dead_servers_turn_is_taken_over_and_it_can_end_it_no_more(everyone: Documents, clock: Clock) -> None:
    wake(everyone.within("ann"), "u", 0)
    dead = claimed(everyone, "dead")
    assert dead is not None
    clock.now += 10
    assert everyone.renew(LEARNING, dead.name, "dead", 15)
    clock.now += 14
    assert claimed(everyone, "two") is None
    clock.now += 2
    second = claimed(everyone, "two")
    assert second is not None
    assert not dead.mine()
    dead.end()
    dead.again(0)
    assert second.mine()
    second.again(60)
    assert claimed(everyone) is None
    clock.now += 61
    assert claimed(everyone) is not None


def test_users_of_several_namespaces_are_apart(everyone: Documents) -> None:
    names = {turn_name(space, user) for space in ("ann", "annu", "bob") for user in ("u", "v", "uu")}
    assert len(names) == 9
    for space in ("ann", "bob"):
        wake(everyone.within(space), "u", 0)
    found = {(turn.documents.namespace, turn.user) for _ in range(2) if (turn := claimed(everyone)) is not None}
    assert found == {("ann", "u"), ("bob", "u")}


def test_two_who_wake_one_user_make_one_turn(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/a.db"
    with open_store(url) as store, open_store(url) as other:
        spaces = [Documents(one, "ann") for one in (store, other)]
        gate = threading.Barrier(2)

        def call(space: Documents) -> None:
            gate.wait()
            for _ in range(5):
                wake(space, "u", 0)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(call, spaces))
        assert spaces[0].total(LEARNING) == (1, 0)


def test_events_are_a_users_own_newest_first(everyone: Documents) -> None:
    ann = everyone.within("ann")
    wake(ann, "u", 0)
    wake(ann, "v", 0)
    for n in range(5):
        tell(ann, "u", "learned", f"version {n}", {"version": n})
    tell(ann, "v", "refused", "no")
    tell(ann, "nobody", "learned", "is told to nobody")
    assert [one.data["data"]["version"] for one in events(ann, "u", limit=3)] == [4, 3, 2]
    last = events(ann, "u", limit=3)[-1].name
    assert [one.data["message"] for one in events(ann, "u", after=last)] == ["version 1", "version 0"]
    assert [one.data["type"] for one in events(ann, "v")] == ["refused"]
    assert events(everyone.within("bob"), "u") == []
    assert ann.rm(LEARNING, turn_name("ann", "u"))
    assert events(ann, "u") == []


def test_what_the_rules_keep_waiting_is_taken_when_they_change(everyone: Documents, clock: Clock) -> None:
    ann = everyone.within("ann")
    for user, parked in (("u", True), ("v", False)):
        wake(ann, user, 0)
        turn = claimed(everyone)
        assert turn is not None
        turn.end(parked=parked)
    clock.now += 100
    assert claimed(everyone) is None
    assert wake_all(everyone.within("bob"), 0) == 0
    assert wake_all(ann, 10) == 1
    assert claimed(everyone) is None
    clock.now += 10
    turn = claimed(everyone)
    assert turn is not None
    assert turn.user == "u"
    turn.end(parked=True)
    assert wake_all(ann, 0, rested=True) == 2
    wake(ann, "u", 0)  # not parked any more
    found = [claimed(everyone) for _ in range(2)]
    assert {turn.user for turn in found if turn is not None} == {"u", "v"}


def test_the_oldest_events_go(everyone: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "EVENTS", 3)
    ann = everyone.within("ann")
    wake(ann, "u", 0)
    for n in range(5):
        tell(ann, "u", "learned", f"version {n}")
    assert [one.data["message"] for one in events(ann, "u")] == ["version 4", "version 3", "version 2"]
