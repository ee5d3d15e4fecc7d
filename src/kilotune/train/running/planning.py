"""The plan of a training: what is trained, how long it is, what it takes of memory against what the machine has.

::

    plan = plan_run(session)          # a few seconds: a step is rehearsed on tensors without numbers
    for line in plan.lines(): print(line)
    plan.to_dict()                    # for --json
    plan.fits                         # False: it will not; None: nobody knows
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import first_line
from ...model.adapter_model import AdapterModel
from ...model.parameter_report import ParameterReport, count_parameters, readable_bytes
from ...plan import file_bytes
from ..data.rows import Ragged, Rows
from ..trainer.from_settings import FEWEST_STEPS, USUAL_EPOCHS, epochs_of, steps_of_epoch, total_steps
from . import base_model as models
from .memory import Estimate, Machine, estimate_memory, machine_of
from .memory_rehearsal import Step, held_tensors
from .pace import Pace, pace_of
from .process_memory import process_bytes

if TYPE_CHECKING:
    from .session import Session

__all__ = ["RunPlan", "largest_rows", "plan_run"]

_WHERE = {"memory": "in memory", "disk": "on disk"}
PAGE = 4096  # bytes that a system reads of a file at least
SHORT = 40  # steps, the fewest that the rule of rates was held against a grid at
LOOKED_AT = 1000  # rows of a data set whose lengths only reading them tells


@final
@dataclass(frozen=True)
class RunPlan:
    """What is going to happen.

    what: task, method and base. parameters: counts. file_bytes: of the adapter, or of the model where all of it is
    saved. rows, tokens: of train; tokens 0 where it has none. steps: of the optimizer, in all. epochs: in all. raised:
    whether they are more than usual, so that there are enough steps. batch: the shape of the largest. pace: what it
    takes of time; None where no step was run. memory: None where it could not be found out, and ``unknown`` says why.
    sharded: whether the processes share the frozen weights out. knobs: what needs less. notes: what the user has to
    know of data and model. cached: how much is kept of what goes into the last blocks, in words.
    """

    what: str
    parameters: ParameterReport
    file_bytes: int
    rows: int
    tokens: int
    steps: int
    steps_per_epoch: int
    epochs: float
    accumulation: int
    processes: int
    batch: tuple[int, ...]
    memory: Estimate | None
    machine: Machine
    unknown: str = ""
    pace: Pace | None = None
    raised: bool = False
    sharded: bool = False
    knobs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cached: str = ""

    @property
    def fits(self) -> bool | None:
        """Whether the memory will do; None where that is not known."""
        return None if self.memory is None else self.memory.fits(self.machine)

    def lines(self) -> list[str]:
        """What the user reads before it starts."""
        counts = self.parameters
        share = f"{counts.percent:.3g} % of {counts.total:,}"
        size = readable_bytes(self.file_bytes)
        return [
            f"{self.what}: {counts.trainable:,} numbers are trained ({share}); {size} on disk",
            f"{self._data()}; {self.steps:,} steps{self._how()}, {self.epochs:.3g} epochs{self._why()}",
            *([self.pace.line()] if self.pace is not None else []),
            *self._memory(),
            *([self.cached] if self.cached else []),
            *([self.short] if self.short else []),
            *self.notes,
        ]

    @property
    def short(self) -> str:
        """A line for a training of so few steps that most methods learn little in it."""
        if self.steps >= SHORT:
            return ""
        return (
            f"{self.steps} steps are too few for most adapters to learn much in: give more epochs or rows "
            f"(training.max_steps, if that is set), to {SHORT} steps and more"
        )

    def _data(self) -> str:
        tokens = f", {self.tokens:,} tokens in all" if self.tokens else ""
        return f"{self.rows:,} rows to train on{tokens}"

    def _why(self) -> str:
        return f", so that there are {FEWEST_STEPS} steps (training.epochs)" if self.raised else ""

    def _how(self) -> str:
        parts = [f"batches of {self.batch[0]}"] if self.batch else []
        parts += [f"{self.accumulation} batches a step"] if self.accumulation > 1 else []
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        return f" ({', '.join([*parts, f'{self.steps_per_epoch:,} an epoch'])})"

    def _memory(self) -> list[str]:
        if self.memory is None:
            return [f"memory: not known beforehand: {self.unknown}"]
        have = ""
        if self.machine.total:
            free = self.machine.free + self.memory.loaded + self.memory.process
            have = f" of {readable_bytes(free)} that are free for it ({self.machine.name})"
        shape = " x ".join(map(str, self.batch))
        peak = f"{readable_bytes(self.memory.peak)}{have}"
        each = " in each process" if self.processes > 1 else ""
        lines = [f"memory{each}: {peak} (at the peak: {self.memory.line()}; largest batch {shape})"]
        if self.sharded:
            lines.append(f"once it is loaded, each process keeps 1/{self.processes} of the frozen weights")
        if self.memory.how != "rehearsed":
            lines.append(f"the memory was {self.memory.how}")
        if self.fits is False:
            lines.append(f"that will not fit. What needs less, first things first: {'; '.join(self.knobs)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "what": self.what,
            "parameters": self.parameters.to_dict(),
            "file_bytes": self.file_bytes,
            "rows": self.rows,
            "tokens_per_epoch": self.tokens,
            "tokens": round(self.tokens * self.epochs),
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": self.epochs,
            "raised_epochs": self.raised,
            "largest_batch": list(self.batch),
            "time": None if self.pace is None else self.pace.to_dict(),
            "memory": None if self.memory is None else self.memory.to_dict(),
            "memory_unknown": self.unknown,
            "machine": {"name": self.machine.name, "total": self.machine.total, "free": self.machine.free},
            "fits": self.fits,
            "too_short": bool(self.short),
            "input_cache": self.cached,
            "notes": list(self.notes),
        }


def plan_run(session: Session, knobs: Sequence[str] = ()) -> RunPlan:
    """Plan the training of ``session``, which stays as it is.

    Args:
        session: ready to run.
        knobs: settings that need less memory, in words, the first things first.

    """
    settings, prepared = session.settings, session.prepared
    processes = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    steps, each = total_steps(settings, prepared, processes), steps_of_epoch(settings, prepared, processes)
    here = next((parameter.device for parameter in session.model.parameters()), torch.device("cpu"))
    wanted = models.device_of(settings.training.device)
    device = wanted if wanted.type == "cuda" else here  # it is loaded on the CPU, and moved when it starts
    machine = machine_of(device)
    batch = prepared.collate(largest_rows(prepared.train, settings.training.batch_size))
    memory, unknown = None, ""
    try:
        memory = _estimate(session, batch, processes)
    except Exception as error:  # whatever the model makes of the batch: it is told when the training starts
        unknown = f"{type(error).__name__}: {first_line(error)}"
    if memory is not None and here.type != device.type:
        memory = dataclasses.replace(memory, loaded=0)
    known = (
        here.type == device.type
        and memory is not None
        and memory.fits(machine) is not False
        and not settings.training.shard
    )
    epochs = epochs_of(settings, prepared, processes)
    return RunPlan(
        what=f"{settings.task}, {settings.adapter.method} on {settings.model.base}",
        parameters=count_parameters(session.model),
        file_bytes=_saved_bytes(session.model),
        rows=len(prepared.train),  # type: ignore[arg-type]  # map-style, of known length
        tokens=prepared.tokens,
        steps=steps,
        steps_per_epoch=each,
        epochs=steps / each,
        accumulation=settings.training.accumulation,
        processes=processes,
        batch=_shape(batch),
        memory=memory,
        machine=machine,
        unknown=unknown,
        pace=pace_of(session, steps, processes) if known else None,
        raised=settings.training.max_steps is None and settings.training.epochs is None and epochs > USUAL_EPOCHS,
        sharded=settings.training.shard,
        knobs=tuple(knobs),
        notes=session.notes,
        cached=_cached(session),
    )


def _cached(session: Session) -> str:
    """A line about what goes into the last blocks, where it is kept."""
    settings, prepared = session.settings, session.prepared
    last, run = settings.adapter.last_blocks, settings.training
    if last is None or run.input_cache == "off":
        return ""
    config = getattr(session.model, "config", None)
    width = getattr(config.get_text_config(), "hidden_size", None) if config is not None else None
    bound = run.input_cache_mb * 1e6
    what = f"the last {last} blocks are adapted, and what goes into them is computed once a row"
    if width is None or not prepared.tokens:
        return f"{what} and kept {_WHERE[run.input_cache]}, {readable_bytes(round(bound))} at most"
    validation: Any = prepared.validation
    tokens = prepared.tokens * (1 + (len(validation) if validation is not None else 0) / len(prepared.train))  # type: ignore[arg-type]
    size = next((p.element_size() for p in session.model.parameters() if not p.requires_grad), 4)
    needed = tokens * width * size
    less = "" if needed <= bound else f"; {needed / bound:.1f} times that would be needed (training.input_cache_mb)"
    return f"{what} and kept {_WHERE[run.input_cache]}: {readable_bytes(round(min(needed, bound)))}{less}"


def _estimate(session: Session, batch: Any, processes: int) -> Estimate:
    settings, prepared = session.settings, session.prepared
    run, before = settings.training, _process_with(session.model)
    evaluation = None
    if prepared.validation is not None and run.eval_every is not None:
        evaluation = prepared.collate(largest_rows(prepared.validation, run.eval_batch_size or run.batch_size))
    step = Step(run.precision, run.accumulation, settings.model.gradient_checkpointing, session.loss)
    found = estimate_memory(session.model, batch, step, evaluation=evaluation, processes=processes)
    if models.device_of(run.device).type == "cuda":
        return found
    return dataclasses.replace(found, process=max(0, before - found.loaded))


def _process_with(model: nn.Module) -> int:
    """What this process has with all of the model in memory: of weights in a file, the system has read none before."""
    for tensor in held_tensors(model):
        if tensor.device.type == "cpu" and tensor.is_contiguous() and type(tensor.data) is Tensor:
            tensor.detach().reshape(-1)[:: max(1, PAGE // tensor.element_size())].sum()  # a number of each page
    return process_bytes()


def largest_rows(rows: Any, count: int) -> list[Any]:
    """Rows for the largest batch of ``count``: the longest again and again, and a short one, so that it is padded.

    Where only reading a row tells its length, the first 1,000 are looked at.

    Args:
        rows: a data set of known length, not empty.
        count: the rows of a batch; no more than there are come.

    """
    if isinstance(rows, Rows):
        lengths = [value.lengths for value in rows.values.values() if isinstance(value, Ragged)]
    else:
        lengths = _lengths([rows[i] for i in range(min(len(rows), LOOKED_AT))])
    count = min(count, len(rows))
    if not lengths:
        return [rows[i] for i in range(count)]
    longest = list(dict.fromkeys(int(np.argmax(each)) for each in lengths))[:count]
    chosen = longest + [longest[0]] * (count - len(longest))
    if count > len(longest):
        chosen[-1] = int(np.argmin(lengths[0]))
    return [rows[i] for i in chosen]


def _lengths(rows: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """For every value that is a list, the length in each row; nothing where all rows are alike (pictures)."""
    if not rows or not isinstance(rows[0], dict):
        return []
    names = [name for name, value in rows[0].items() if np.ndim(value) == 1]
    found = [np.array([len(row[name]) for row in rows]) for name in names]
    return [each for each in found if each.min() != each.max()]


def _shape(batch: Any) -> tuple[int, ...]:
    first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return () if first is None else tuple(first.shape)


def _saved_bytes(model: nn.Module) -> int:
    """Of the adapter's file, exactly; or of all weights, where the model itself is saved."""
    if isinstance(model, AdapterModel):
        return file_bytes(model)  # type: ignore[arg-type]  # the one class of it
    return sum(
        tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in model.state_dict().values()}.values()
    )
