"""How often others wait for a grammar that takes long: counted on a clock of the test's own, with no process."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kilotune.serve.engine import grammars, patience
from kilotune.serve.engine.grammar_process import OPEN, TOOK, send_frame
from kilotune.serve.engine.grammars import GRACE, Guide, wait_for
from kilotune.serve.engine.patience import ANSWER, TENANT, Patience, Tenants

STEP = 0.005  # seconds of the model


class Steps:
    """An engine's steps, with answers whose masks take a while of a processor's time; nothing here takes any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.tenants = Tenants(self.clock)
        self.answers: list[Any] = []
        monkeypatch.setattr(grammars, "select", SimpleNamespace(poll=self.poll, POLLIN=1))

    def clock(self) -> float:
        return self.now

    def add(self, tenant: str, mask: Callable[[], float], took: float | None = None) -> Any:
        """mask: seconds until it is there; took: of a processor, where that is less."""
        mine, its = socket.socketpair()
        guide = Guide(mine, 8, [0], [], Patience(ANSWER, self.clock), self.tenants.of(tenant))
        one = SimpleNamespace(guide=guide, its=its, mask=mask, took=took, waits=0, tokens=0, out=False)
        self.begin(one)
        self.answers.append(one)
        return one

    def begin(self, one: Any) -> None:
        """The next mask."""
        seconds = one.mask()
        one.due, one.mask_took = self.now + seconds, seconds if one.took is None else one.took

    def poll(self) -> Any:
        def wait(milliseconds: float) -> None:
            until = self.now + milliseconds / 1000
            due = [one.due for one in self.answers if one.due is not None and not one.guide.known]
            for one in self.answers:
                one.waits += one.guide in self.registered
            self.now = max(self.now, min([until, *due]))
            self.send()

        self.registered = set[Any]()
        return SimpleNamespace(register=self.register, poll=wait)

    def register(self, wire: Any, what: int) -> None:
        self.registered |= {one.guide for one in self.answers if one.guide.wire is wire}

    def send(self) -> None:
        """What masks are there by now."""
        for one in self.answers:
            if one.due is not None and one.due <= self.now + 1e-9:
                send_frame(one.its, OPEN + TOOK.pack(one.mask_took) + np.packbits(np.ones(8, bool)).tobytes())
                one.due = None

    def run(self, steps: int, strangers: bool = False) -> None:
        for _ in range(steps):
            self.now += STEP
            self.send()
            running = [one for one in self.answers if not one.out or one.guide.look()]
            wait_for([one.guide for one in running], True, strangers, self.clock)
            for one in running:
                one.out = not one.guide.known
                if one.guide.known:
                    one.tokens += 1
                    one.guide.allowed = None
                    self.begin(one)

    def close(self) -> None:
        for one in self.answers:
            one.guide.wire.close()
            one.its.close()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Steps(monkeypatch)
    yield made
    made.close()


def taking(seconds: float) -> Callable[[], float]:
    return lambda: seconds


def test_what_is_left_grows_back_with_the_time() -> None:
    now = [0.0]
    one = Patience(patience.Bound(1.0, 0.25), lambda: now[0])
    one.spend(0.75)
    assert one.left == 0.25
    now[0] = 1.0
    assert one.left == 0.5
    one.spend(9.0)
    assert one.left == -8.5
    one.spend(-9.0)
    assert one.left == 0.5
    now[0] = 100.0
    assert one.left == 1.0


def test_a_slow_grammar_is_waited_for_so_long_and_no_more(steps: Any) -> None:
    """Each of its masks takes longer than a step may wait; beside it one that is in time, which loses nothing."""
    slow, good = steps.add("ann", taking(0.049)), steps.add("ann", taking(0.001))
    steps.run(3000)
    assert good.tokens == 3000
    assert slow.tokens > 100, "it goes on, in the steps where its mask is there"
    waited = steps.now - 3000 * STEP
    assert waited <= ANSWER.seconds + ANSWER.share * steps.now + GRACE
    assert slow.waits <= (ANSWER.seconds + ANSWER.share * steps.now) / GRACE + 2


def test_a_grammar_that_is_a_little_late_each_time_is_charged_as_well(steps: Any) -> None:
    """It is done while the step waits, and so never sits out."""
    _, good = steps.add("ann", taking(STEP + 0.015)), steps.add("ann", taking(0.001))
    steps.run(3000)
    assert good.tokens == 3000
    waited = steps.now - 3000 * STEP
    assert waited <= ANSWER.seconds + ANSWER.share * steps.now + GRACE


def test_what_is_late_as_processors_are_busy_is_not_its_fault(steps: Any) -> None:
    draw = random.Random(0)
    late = steps.add("ann", lambda: STEP + draw.choice([0.0, 0.01, 0.015]), took=0.0003)
    steps.run(1000)
    assert late.tokens == 1000


def test_many_answers_of_one_tenant_have_one_part_where_there_are_strangers(steps: Any) -> None:
    """New ones, too, one after the other: each would be waited for at first."""
    good = steps.add("bob", taking(0.001))
    for _ in range(60):
        slow = steps.add("ann", taking(0.049))
        steps.run(50, strangers=True)
        steps.answers.remove(slow)
        slow.guide.wire.close()
        slow.its.close()
    assert good.tokens == 3000
    waited = steps.now - 3000 * STEP
    assert waited <= TENANT.seconds + TENANT.share * steps.now + GRACE
    fresh = steps.add("cyd", taking(0.049))
    steps.run(1, strangers=True)
    assert fresh.waits == 1, "it is another tenant's"


def test_who_is_alone_is_waited_for(steps: Any) -> None:
    alone = steps.add("ann", taking(STEP + 0.015))
    for _ in range(500):
        steps.now += STEP
        steps.send()
        wait_for([alone.guide], False, False, steps.clock)
        assert alone.guide.known
        alone.guide.allowed = None
        steps.begin(alone)


def test_tenants_are_known_between_their_answers_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "TENANTS", 3)
    tenants = Tenants(lambda: 0.0)
    first = tenants.of("a")
    first.spend(1.0)
    assert tenants.of("a") is first
    for name in "bca":
        tenants.of(name)
    assert tenants.of("a") is first
    for name in "bcd":
        tenants.of(name)
    assert tenants.of("a").left == TENANT.seconds
