"""A training step without its numbers: how much memory it takes, counted and not guessed.

The model is copied onto torch's *fake tensors*, which have shapes, dtypes, devices and storages of a size, and no data;
the real forward, the real autograd and the real checkpointing run on them, and each storage is entered in a ledger when
an operator makes it, and struck out when its last reference goes. So what a method, an attention, a dtype or a batch
costs is not modelled here at all::

    counted = rehearse(model, batch, Step(precision="bfloat16"))
    counted.peak, counted.gradients, counted.kept          # bytes beyond weights and optimizer

Where a model does what depends on its numbers (the routing of an expert layer), fakes cannot go on:
:class:`CannotRehearse`, and :func:`count_real` runs the step in earnest, on a smaller batch if that is wanted.

What touches internals of torch and transformers stands here and in memory_ledger.py; tested with torch 2.13 and
transformers 5.23.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...errors import KilotuneError, first_line
from ...projections.matrices import Projections
from .memory_ledger import Ledger

__all__ = [
    "PLAIN",
    "CannotRehearse",
    "Counted",
    "Step",
    "count_real",
    "held_tensors",
    "rehearse",
    "time_real",
    "twin_of",
]

BLOCK = {"cuda": 512}  # CUDA's allocator hands out whole blocks of so many bytes
Batch = Mapping[str, Any]


class CannotRehearse(KilotuneError):
    """The model's shapes depend on its numbers, so that only a step in earnest tells what it takes."""


@final
@dataclass(frozen=True)
class Step:
    """What is done with a batch.

    precision: ``bfloat16`` for autocast, as in the Trainer; ``float32`` for none. accumulation: forward passes per
    step; beyond one, gradients lie there during the next forward. checkpointing: switched on for the rehearsal, as the
    Trainer does it for the training. loss: of the output and the labels, for modules that return none; a batch is then
    ``{"inputs": ..., "labels": ...}``.
    """

    precision: str = "float32"
    accumulation: int = 1
    checkpointing: bool = False
    loss: Callable[[Any, Any], Tensor] | None = None


PLAIN = Step()


@final
@dataclass(frozen=True)
class Counted:
    """What a step takes beyond the tensors that the model holds anyway.

    peak: the most bytes at a time. gradients: of the trained parameters, within that moment. kept: bytes that are held
    for the backward when the forward has ended.
    """

    peak: int
    gradients: int
    kept: int


def rehearse(model: nn.Module, batch: Batch, step: Step = PLAIN, *, training: bool = True) -> Counted:
    """Run a step on fakes of ``model`` and ``batch``; both stay as they are.

    Args:
        model: in the state that it is trained in: adapters, what is frozen; on any device.
        batch: what the model is called with.
        step: what is done with it.
        training: False for a forward without gradients, as in an evaluation.

    Raises:
        CannotRehearse: the model cannot run on fakes.

    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ledger = Ledger(BLOCK.get(_device(model).type, 1))
    try:
        with _quiet(), FakeCopyMode(mode):
            # What is frozen need not be copied: nothing writes to it, and quantised weights cannot be.
            twin = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
        held = [_faked(mode, tensor) for tensor in held_tensors(twin)]
        fakes = {id(t): _faked(mode, t) for t in _tensors(batch)}
        for tensor in _tensors(batch):
            ledger.tell(fakes[id(tensor)], tensor)
        fake = tree_map_only(Tensor, lambda tensor: fakes[id(tensor)], dict(batch))
        with _quiet(), _numbers_are_there(), mode, ledger:
            ledger.know([*held, *fakes.values()])
            return _count(ledger, twin, fake, step, training)
    except Exception as error:  # torch has a dozen kinds for what fakes cannot do
        raise CannotRehearse(f"cannot be run without numbers: {type(error).__name__}: {first_line(error)}") from error


def count_real(model: nn.Module, batch: Batch, step: Step = PLAIN, *, training: bool = True) -> Counted:
    """The same on the model itself, in earnest; takes its memory. Buffers and random numbers stay as they were."""
    ledger = Ledger(BLOCK.get(_device(model).type, 1))
    with _as_it_was(model), ledger:
        ledger.know([*held_tensors(model), *_tensors(batch)])
        return _count(ledger, model, batch, step, training)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own for what is trained; all else is the model's, so no step of it is seen."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held_tensors(model) if not tensor.requires_grad})


def time_real(model: nn.Module, batch: Batch, step: Step = PLAIN) -> tuple[float, float]:
    """(seconds of a forward, of it and its backward), in earnest, once; the model stays as it is."""
    device = _device(model)
    with _quiet(), _as_it_was(model), _checkpointing(model, step.checkpointing):
        model.train()
        began = _now(device)
        loss = _loss(model, batch, step)
        middle = _now(device)
        loss.backward()  # type: ignore[no-untyped-call]
        return middle - began, _now(device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_tensors(model: nn.Module) -> list[Tensor]:
    """All that a model holds whether it runs or not; the frozen projections are neither parameters nor buffers."""
    projections = [t for m in model.modules() if isinstance(m, Projections) for t in m.tensors()]
    return [*model.parameters(), *model.buffers(), *projections]


# -- the step ------------------------------------------------------------------------------------------


def _count(ledger: Ledger, model: nn.Module, batch: Batch, step: Step, training: bool) -> Counted:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train(training)
    if not training:
        with torch.no_grad():
            output = _call(model, batch, step)
        del output
        return Counted(ledger.peak(set())[0], 0, 0)
    with _checkpointing(model, step.checkpointing):
        kept = 0
        for _ in range(min(2, step.accumulation)):
            loss = _loss(model, batch, step)
            kept = max(kept, ledger.now - ledger.of(parameter.grad for parameter in trained))
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
    numbers = {ledger.number(parameter.grad) for parameter in trained if parameter.grad is not None}
    peak, gradients = ledger.peak(numbers)
    return Counted(peak, gradients, kept)


def _loss(model: nn.Module, batch: Batch, step: Step) -> Tensor:
    """The loss; all other outputs go, as in the Trainer."""
    output = _call(model, batch, step)
    loss: Tensor = output["loss"] if isinstance(output, Mapping) else output[0]
    return loss


def _call(model: nn.Module, batch: Batch, step: Step) -> Any:
    if step.precision == "float32":
        return _called(model, batch, step)
    with torch.autocast(_device(model).type, dtype=torch.bfloat16):
        output = _called(model, batch, step)
    # accelerate turns what an autocast model gives back into float32.
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.bfloat16 else t, output)


def _called(model: nn.Module, batch: Batch, step: Step) -> Any:
    if step.loss is None:
        return model(**batch)
    given = batch["inputs"]
    if isinstance(given, Mapping):
        output = model(**given)
    else:
        output = model(*given) if isinstance(given, tuple | list) else model(given)
    return {"loss": step.loss(output, batch["labels"]), "logits": output}


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Switch on what the Trainer switches on; off again afterwards."""
    if not wanted:
        yield
        return
    base: Any = model
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # the latter before 5.23
        if callable(enable := getattr(base, name, None)):
            enable()
            break
    else:
        raise KilotuneError(f"{type(model).__name__} has no gradient checkpointing to switch on")
    try:
        yield
    finally:
        getattr(base, name.replace("enable", "disable"))()


# -- models and batches --------------------------------------------------------------------------------


def _faked(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """The fake of a tensor: the one that operators will meet, for the mode keeps it as long as it is held."""
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)


def _tensors(batch: Batch) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Fakes make torch talk."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _numbers_are_there() -> Iterator[None]:
    """Let transformers look whether a mask is all ones.

    It takes fakes for a tracer's and looks at none; then it makes masks that a training does not need. The ledger knows
    the numbers of masks and positions (and where it does not, the rehearsal fails).
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    before = getattr(masks, "is_tracing", None)
    if before is None:
        yield
        return
    masks.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masks.is_tracing = before


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Buffers (running means), the mode of each module, gradients and random numbers are put back."""
    device = _device(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
