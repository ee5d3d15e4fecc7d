"""How a learning rate goes over the steps of a training: the one formula of ``kilotune train`` and of fleets."""

from __future__ import annotations

import math

__all__ = ["SCHEDULES", "rate_factor"]

SCHEDULES = ("linear", "cosine", "constant")


def rate_factor(step: int, steps: int, warmup: float, schedule: str) -> float:
    """What the highest rate is multiplied by in step number ``step`` (from 0) of ``steps``.

    It rises in equal parts over the warm-up, whose first step is one part and not 0: a step at rate 0 learns nothing.
    Then it is the highest, and falls so that it would be 0 in the step behind the last one.

    Args:
        step: from 0.
        steps: in all.
        warmup: below 1 a part of all steps, else a number of steps.
        schedule: linear, cosine or constant.

    """
    rise = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    part = (step - rise) / max(1, steps - rise)
    return max(0.0, 1.0 - part if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * part)))
