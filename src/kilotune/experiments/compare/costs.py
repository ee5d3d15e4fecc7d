"""What a contender costs: numbers trained, bytes on disk, time of a step, peak memory.

**A step** is the forward, the loss, the backward and AdamW's step. **The floor** is the forward and backward through
the frozen base, with a gradient asked for at the output of its first layer, so that the backward runs through all
others; nothing is trained, and there is no optimizer. Contender and floor take turns, and what is reported is the
median of the ratios of neighbouring turns: processor time on a CPU, which leaves out when other processes run; the
clock on a GPU.

**Peak memory** is the model, the optimizer's state, and the most that the allocator has handed out at one moment of a
step beyond them: activations, gradients, what is made in passing.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...model.adapter_model import AdapterModel
from ...model.parameter_report import count_parameters
from .problem import Bench

__all__ = ["Costs", "Floor", "measure"]

ROUNDS = 9
LEAST_SECONDS = 0.03  # of one turn: shorter ones are repeated
RATE = 1e-9  # of the steps that are timed: what they do does not depend on it, and the weights stay near the start


@final
@dataclass(frozen=True)
class Costs:
    """What one contender costs.

    Attributes:
        trained: numbers.
        disk_bytes: of all files that are kept: the adapter's two; for ``full`` and ``head`` a safetensors file of what
            is trained.
        step_ratio: time of a step, against the floor's.
        step_seconds: time of a step.
        peak_bytes: see the module's head.
    """

    trained: int
    disk_bytes: int
    step_ratio: float
    step_seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


@final
class Floor:
    """The frozen base, forward and backward."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        _ask_for_gradient(bench)

    def step(self) -> None:
        """One pass in both directions; no gradient is kept in the model, as nothing in it asks for one."""
        self.bench.loss().backward()  # type: ignore[no-untyped-call]


def _ask_for_gradient(bench: Bench) -> None:
    """At the output of the first module with parameters of its own that reaches the loss.

    Where the inputs of the last blocks are kept, what the embedding gives is not used a second time.
    """
    called: dict[nn.Module, None] = {}
    owners = [m for m in bench.model.modules() if next(m.parameters(recurse=False), None) is not None]
    hooks = [m.register_forward_hook(lambda module, _args, _output: called.setdefault(module)) for m in owners]
    with torch.no_grad():
        bench.loss()
    for hook in hooks:
        hook.remove()
    for module in called:
        hook = module.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
        if bench.loss().requires_grad:
            return
        hook.remove()
    raise UnsupportedError("the frozen base's loss depends on the output of none of its modules")


def measure(bench: Bench, floor: Floor) -> Costs:
    """Take the costs of one contender.

    Args:
        bench: a fresh model of it; its weights hardly move.
        floor: of the same problem.
    """
    trained = [p for p in bench.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def step() -> None:
        bench.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    disk = _disk_bytes(bench.model)
    step()  # the optimizer makes its state, and what is computed once is
    seconds, ratio = _times(step, floor.step, trained[0].device)
    state = [t for held in optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
    held = count_parameters(bench.model).total_bytes + _bytes([*bench.model.buffers(), *state])
    return Costs(
        trained=sum(p.numel() for p in trained),
        disk_bytes=disk,
        step_ratio=ratio,
        step_seconds=seconds,
        peak_bytes=held + _peak(step, trained[0].device),
    )


def _disk_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory(prefix="kilotune-compare-") as name:
        folder = Path(name)
        if isinstance(model, AdapterModel):
            model.save_pretrained(folder)
        else:
            trained = {key: p.detach().contiguous() for key, p in model.named_parameters() if p.requires_grad}
            save_file(trained, folder / "model.safetensors")
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _times(step: Callable[[], None], floor: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """(seconds of a step, median ratio to the floor's)."""
    floor()
    repeats = max(1, round(LEAST_SECONDS / max(_seconds(floor, 1, device), 1e-6)))
    pairs = [(_seconds(step, repeats, device), _seconds(floor, repeats, device)) for _ in range(ROUNDS)]
    return statistics.median(one for one, _ in pairs), statistics.median(one / other for one, other in pairs)


def _seconds(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Of one ``run``, the mean of some."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    began = clock()
    for _ in range(repeats):
        run()
    _wait(device)
    return (clock() - began) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """The most that is handed out by the allocator at one moment of a step, beyond what there was before."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return int(torch.cuda.max_memory_allocated(device)) - int(before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop on stderr
    gc.collect()  # what was there before is not to be given back in between
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profiler: Any = profile.profiler
    live = peak = 0
    for event in profiler.kineto_results.events():  # in the order of time
        if event.name() == "[memory]":
            live += event.nbytes()  # negative for a release
            peak = max(peak, live)
    return peak
