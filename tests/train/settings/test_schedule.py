"""The rate of each step: against transformers' own schedules, shifted so that no step is at 0."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from kilotune.fleet.joint.settings import FleetSettings
from kilotune.train.settings.schedule import SCHEDULES, rate_factor


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "warmup", "rise"), [(10, 3, 3), (10, 0.25, 3), (104, 0.06, 7), (5, 0, 0), (3, 9, 9)])
def test_the_fall_is_transformers_and_the_rise_begins_above_0(
    schedule: str, steps: int, warmup: float, rise: int
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=rise, num_training_steps=steps)
    for step in range(steps):
        mine = rate_factor(step, steps, warmup, schedule)
        assert mine == FleetSettings(warmup=warmup, schedule=schedule).factor(step, steps)
        assert mine > 0
        if step < rise:
            assert mine == pytest.approx((step + 1) / (rise + 1))
        else:
            assert mine == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    parts = [rate_factor(step, steps, warmup, schedule) for step in range(min(rise + 1, steps))]
    assert all(math.isclose(b - a, parts[0]) for a, b in pairwise(parts)), "it rises in equal parts"
