"""What a training takes of memory, before it runs, and what the machine has.

The estimate is counted, not modelled: memory_rehearsal.py runs a step on tensors without numbers::

    estimate = estimate_memory(model, batch, Step(precision="bfloat16", checkpointing=True), evaluation=other_batch)
    estimate.peak                     # bytes on the device, weights included
    machine = machine_of(device)
    estimate.fits(machine)

``benchmarks/train_memory.py`` holds it against the measured peak of real trainings.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...model.parameter_report import count_parameters, readable_bytes
from .memory_ledger import storages
from .memory_rehearsal import PLAIN, Batch, CannotRehearse, Counted, Step, count_real, rehearse

__all__ = ["Estimate", "Machine", "estimate_memory", "machine_of"]

STATES = 2  # AdamW keeps two numbers for each that is trained
CGROUPS = (  # (limit, what is used of it): the newer form of Linux's containers, and the older
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@final
@dataclass(frozen=True)
class Machine:
    """Where it runs. name: of the device. total, free: its bytes; 0 where the system does not tell."""

    name: str
    total: int
    free: int


@final
@dataclass(frozen=True)
class Estimate:
    """What a training takes on its device, in bytes.

    weights: all that the model holds: frozen, trained, shared projections, buffers. loaded: those of them that are on
    the device already. gradients: at the step's peak. optimizer: AdamW's. activations: all else at the step's peak.
    kept: what is held for the backward when the forward has ended. evaluation: the most of an evaluation's forward,
    beyond weights and optimizer. buckets: where several processes average their gradients, DistributedDataParallel's
    copy of them. process: on a CPU, what the process has beside the model: Python, its libraries, the data. how:
    ``rehearsed``, or why the step was run in earnest, on a few rows.
    """

    weights: int
    loaded: int
    gradients: int
    optimizer: int
    activations: int
    kept: int
    evaluation: int
    buckets: int = 0
    process: int = 0
    how: str = "rehearsed"

    @property
    def peak(self) -> int:
        """The most at a time; on a CPU of the whole process, as its result tells it."""
        return self.process + self.tensors

    @property
    def tensors(self) -> int:
        """The most of tensors at a time."""
        return self.weights + self.optimizer + self.buckets + max(self.gradients + self.activations, self.evaluation)

    def fits(self, machine: Machine) -> bool | None:
        """Whether what is still to come fits into what is free; None where the system does not tell."""
        return self.tensors - self.loaded <= machine.free if machine.total else None

    def line(self) -> str:
        """The parts in one line."""
        parts = {
            "weights": self.weights,
            "activations": self.activations,
            "gradients": self.gradients + self.buckets,
            "optimizer": self.optimizer,
        }
        parts |= {"Python and libraries": self.process} if self.process else {}
        told = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items())
        more = self.gradients + self.activations < self.evaluation
        return f"{told}; an evaluation {readable_bytes(self.evaluation)}" if more else told

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {"peak": self.peak, "tensors": self.tensors, **asdict(self)}


def estimate_memory(
    model: nn.Module, batch: Batch, step: Step = PLAIN, *, evaluation: Batch | None = None, processes: int = 1
) -> Estimate:
    """What training ``model`` with AdamW takes.

    Args:
        model: as it is trained; in real memory, where the device decides how it computes. It stays as it is.
        batch: the largest that comes.
        step: what is done with it.
        evaluation: the largest batch of an evaluation; None where there is none.
        processes: how many train together.

    Raises:
        Exception: whatever the model raises on this batch, where it cannot be rehearsed.

    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = _on(device, batch)
    counted, how = _counted(model, batch, step)
    other = 0 if evaluation is None else _counted(model, _on(device, evaluation), step, training=False)[0].peak
    report = count_parameters(model)
    weights = report.total_bytes + _buffer_bytes(model)
    return Estimate(
        weights=weights,
        loaded=0 if device.type == "meta" else weights,
        gradients=counted.gradients,
        optimizer=STATES * report.trainable_bytes,
        activations=counted.peak - counted.gradients,
        kept=counted.kept,
        evaluation=other,
        buckets=report.trainable_bytes if processes > 1 else 0,
        how=how,
    )


def _counted(model: nn.Module, batch: Batch, step: Step, training: bool = True) -> tuple[Counted, str]:
    """Rehearsed; where that cannot be, in earnest with one row and with two, and a straight line through both."""
    try:
        return rehearse(model, batch, step, training=training), "rehearsed"
    except CannotRehearse as error:
        rows = _rows(batch)
        one = count_real(model, _first(batch, 1), step, training=training)
        two = one if rows < 2 else count_real(model, _first(batch, 2), step, training=training)
        return (
            Counted(
                peak=one.peak + (rows - 1) * max(0, two.peak - one.peak),
                gradients=two.gradients,
                kept=one.kept + (rows - 1) * max(0, two.kept - one.kept),
            ),
            f"counted on a step of {min(rows, 2)} rows, for the model {error}",
        )


def _rows(batch: Batch) -> int:
    sizes = [len(leaf) for leaf in _leaves(batch) if leaf.ndim]
    return max(set(sizes), key=sizes.count) if sizes else 1


def _first(batch: Batch, count: int) -> dict[str, Any]:
    """The first rows of a batch: of every tensor that has as many as most."""
    rows = _rows(batch)
    return tree_map_only(Tensor, lambda t: t[:count] if t.ndim and len(t) == rows else t, dict(batch))  # type: ignore[no-any-return]


def _on(device: torch.device, batch: Batch) -> dict[str, Any]:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(batch))  # type: ignore[no-any-return]


def _leaves(batch: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]


def _buffer_bytes(model: nn.Module) -> int:
    held = {storage: storage.nbytes() for buffer in model.buffers() for storage in storages(buffer)}
    return sum(held.values())


# -- the machine ---------------------------------------------------------------------------------------


def machine_of(device: torch.device, cgroups: Any = CGROUPS) -> Machine:
    """What a device has; for the CPU, the least that the system and a container's limit leave."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Machine(torch.cuda.get_device_name(device), int(total), int(free + spare))
    if device.type != "cpu":
        return Machine(device.type, 0, 0)
    try:
        import psutil
    except ImportError:
        return Machine("CPU", 0, 0)
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit_file, used_file in cgroups:
        limit, used = _number_in(limit_file), _number_in(used_file)
        if limit is not None and used is not None and limit < total:
            total, free = limit, min(free, max(0, limit - used))
    return Machine("CPU", total, free)


def _number_in(path: str | os.PathLike[str]) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None
