"""A part of the processor: no more than that while something is answered, and no less."""

from __future__ import annotations

import pytest

from kilotune.errors import ConfigError
from kilotune.serve.learning.share import Share


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(share: Share, clock: Clock, busy: bool, cost: float, until: float) -> float:
    """Passes of ``cost`` seconds whenever they may begin; what they took in all."""
    took = 0.0
    for _ in range(1_000_000):
        if clock.now >= until:
            return took
        if (left := share.wait(busy)) > 0:
            clock.now += min(left, 0.05)
            continue
        clock.now += cost
        share.took(cost, busy)
        took += cost
    raise AssertionError("it does not go on")


@pytest.mark.parametrize("cores", [0.25, 0.5])
@pytest.mark.parametrize("cost", [0.02, 1.0])
def test_it_is_that_part_while_something_is_answered(cores: float, cost: float) -> None:
    clock = Clock()
    took = run(Share(cores, clock=clock), clock, True, cost, 100.0 + 400)
    assert took == pytest.approx(400 * cores, abs=0.5 + cost)


def test_all_of_it_is_had_while_nothing_is_and_none_of_that_is_owed_later() -> None:
    clock = Clock()
    share = Share(0.25, clock=clock)
    assert run(share, clock, False, 1.0, 200.0) == 100
    assert share.wait(True) == 0


def test_what_is_saved_up_in_a_long_rest_is_bounded() -> None:
    clock = Clock()
    share = Share(0.25, saved=0.5, clock=clock)
    clock.now += 10_000
    in_a_row = 0
    while share.wait(True) == 0:
        share.took(0.1, True)
        in_a_row += 1
    assert in_a_row <= 6


@pytest.mark.parametrize("cores", [0, -1.0, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(cores: float) -> None:
    with pytest.raises(ConfigError, match="expected a number of cores above 0"):
        Share(cores)
