"""In what a CPU holds weights whose dtype is ``auto``: as they were saved, or in float32 where that is much faster.

Many CPUs have no instructions for products of bfloat16. On one with AVX2 alone their backward takes 30 times float32's
time, so a base that was saved in bfloat16 trains 30 times slower than it could. A product of each dtype is timed once::

    held = held_dtype(model, "auto", torch.device("cpu"), backward=True)   # before adapters are put in
    model = held.apply(model)                                              # as it is, or in float32
    held.note                                                              # what to tell of it, or ""
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from ..._ui.sizes import readable_bytes
from .memory import Machine, machine_of

__all__ = ["AS_SAVED", "WIDENED", "Held", "fast_dtype", "held_dtype", "product_seconds"]

SHAPE = (64, 576, 1536)  # rows, in, out: of a layer of a small language model
LASTS = 0.05  # seconds that a dtype is timed for
SLOW = 1.5  # times float32's time, from which on weights are widened
SPARE = 0.8  # of the free memory may go to wider weights: the run needs some too
NARROW = (torch.bfloat16, torch.float16)
AS_SAVED, WIDENED = "as saved", "float32"
Seconds = Callable[[torch.dtype, bool], float]


@final
@dataclass(frozen=True)
class Held:
    """How the weights are held: ``as saved`` or ``float32``; and what to tell of that, as a rule nothing."""

    how: str = AS_SAVED
    note: str = ""

    def apply(self, model: nn.Module) -> nn.Module:
        """The model itself, its weights in float32 now where that was chosen."""
        if self.how == WIDENED:
            nn.Module.float(model)  # transformers' own refuses more than it has to
            config = getattr(model, "config", None)
            if config is not None:
                config.dtype = torch.float32
        return model


def held_dtype(
    model: nn.Module,
    wanted: str,
    device: torch.device,
    *,
    backward: bool,
    seconds: Seconds | None = None,
    machine: Machine | None = None,
) -> Held:
    """How the weights of ``model``, which were loaded as they were saved, are best held.

    Args:
        model: without adapters.
        wanted: the dtype's setting; anything but ``auto`` is what the user said, and stays.
        device: where it is to run; on anything but a CPU the weights stay.
        backward: whether it is trained, and not only run.
        seconds: of a product in a dtype, with its backward or without; None: :func:`product_seconds`, once a process.
        machine: what memory there is; None: this machine.

    """
    narrow = [parameter for parameter in model.parameters() if parameter.dtype in NARROW and not parameter.is_meta]
    if wanted != "auto" or device.type != "cpu" or not narrow or getattr(model, "is_quantized", False):
        return Held()
    dtype = Counter(parameter.dtype for parameter in narrow).most_common(1)[0][0]
    took = seconds or product_seconds
    times = took(dtype, backward) / took(torch.float32, backward)
    if times < SLOW:
        return Held()
    more = sum(parameter.numel() * (4 - parameter.element_size()) for parameter in narrow)
    name = str(dtype).removeprefix("torch.")
    slower = f"{name} products are {times:.2g} times slower than float32's here"
    have = machine or machine_of(device)
    if have.total and more > SPARE * have.free:
        return Held(
            note=f"{slower}, but in float32 the weights would take {readable_bytes(more)} more, and "
            f"{readable_bytes(have.free)} are free: they stay in {name}"
        )
    return Held(WIDENED, f"{slower}: the weights are held in float32, {readable_bytes(more)} more (model.dtype)")


def fast_dtype(device: torch.device, seconds: Seconds | None = None) -> torch.dtype:
    """In what 4-bit weights are multiplied: bfloat16, or float32 on a CPU whose products of bfloat16 are slow."""
    took = seconds or product_seconds
    slow = device.type == "cpu" and took(torch.bfloat16, True) >= SLOW * took(torch.float32, True)
    return torch.float32 if slow else torch.bfloat16


@functools.cache
def product_seconds(dtype: torch.dtype, backward: bool) -> float:
    """Of a product of a frozen matrix on this CPU, with the backward to its input or without: the least of several."""
    rows, inn, out = SHAPE
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inn, generator=generator).to(dtype)
    x = torch.randn(rows, inn, generator=generator).to(dtype).requires_grad_(backward)
    upstream = torch.ones(rows, out, dtype=dtype)

    def once() -> float:
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = torch.nn.functional.linear(x, weight)
        if backward:
            torch.autograd.grad(y, x, upstream)
        return time.perf_counter() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for one another, for long where others use the machine too
    try:
        once()  # sets things up
        until, least = time.perf_counter() + LASTS, once()
        while time.perf_counter() < until:
            least = min(least, once())
    finally:
        torch.set_num_threads(threads)
    return least
