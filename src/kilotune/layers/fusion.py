"""A linear layer and its low-rank change in one function, where that is the same: kernels/lowrank.py does the work.

It is the same where the layer is its product and nothing else (no forward of its own, no hooks), its weight is frozen
and not merged, and the products run in the dtype of the weight. Everywhere else the layer runs as it is, and the change
is added to its output in the factored form, which is always right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..deltas import Delta, LowRank, Rescale
from ..kernels import lowrank, ways
from ..kernels.lowrank import NARROW, Factors, autocast_dtype
from ..kernels.ways import Choice, Way
from ..kinds import LayerKind, hooked
from ..storage import Storage
from .slot import Slot

__all__ = ["factors_of", "leading", "run"]

# The merged forms serve in 16 bits only where rounding W' takes less of the change than this (measured each time, and
# only where such a form is asked for by name): about what the factored form loses by rounding z and F.
LOST = 0.01


def factors_of(delta: LowRank) -> Factors:
    """What of ``delta`` comes after its first factor."""
    return Factors(delta.b, delta.mid, delta.out, delta.scale)


def leading(deltas: Sequence[tuple[Slot, Delta]]) -> tuple[Slot, LowRank] | None:
    """The change that may run in one function with its layer: the first low-rank one; None beside a rescaling one."""
    first: tuple[Slot, LowRank] | None = None
    for slot, delta in deltas:  # a plain loop: torch.compile follows it
        if isinstance(delta, Rescale):
            return None
        if isinstance(delta, LowRank) and first is None:
            first = (slot, delta)
    return first


def run(
    kind: LayerKind, storage: Storage, module: nn.Module, slot: Slot, delta: LowRank, x: Tensor, way: Way
) -> Tensor | None:
    """The layer's output with ``delta`` in it (..., out); None where the two must run one after the other."""
    if lowrank.plain() or not isinstance(x, Tensor):  # what is no tensor is refused by the layer, in its words
        return None
    weight = _weight(kind, storage, module, x)
    if weight is None or not _fits(x, storage.dtype(module), delta):
        return None
    factors = factors_of(delta)
    choice = _choice(slot, delta, x, way)
    if choice != ways.WAYS[Way.FACTORED] and x.dtype in NARROW and _loses(weight, delta, factors):
        choice = ways.WAYS[Way.FACTORED]
    z = None
    if not delta.a.requires_grad and lowrank.needs_z(choice, factors):
        z = slot.first_product(x, delta.a, lambda: kind.project(module, x, delta.a))  # (..., r)
    return lowrank.linear(x, weight, storage.read_bias(module), delta.a, factors, choice, z)


def _weight(kind: LayerKind, storage: Storage, module: nn.Module, x: Tensor) -> Tensor | Callable[[], Tensor] | None:
    """The canonical matrix (out, in), or what reads it; None where the layer is more than its product with it."""
    reads = storage.multiplies_read(module, torch.is_grad_enabled() and x.requires_grad)
    if not (reads or (storage.lossless and kind.is_product(module, x))) or _hooked(module):
        return None
    if reads:
        held = storage.keep(module)  # the weight of now, whatever is merged before the backward
        return lambda: kind.canonical(module, storage.read(module, held))
    weight = module._parameters.get(storage.weight_name)
    if weight is None or weight.requires_grad:
        return None
    return kind.canonical(module, weight)


def _hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes through the layer itself."""
    return "forward" in module.__dict__ or hooked(module)


def _fits(x: Tensor, dtype: torch.dtype, delta: LowRank) -> bool:
    """Whether all products run in one dtype, that of the weight."""
    return x.dtype == dtype == delta.a.dtype and delta.a.ndim == 2 and autocast_dtype(x.device) in (None, dtype)


def _choice(slot: Slot, delta: LowRank, x: Tensor, way: Way) -> Choice:
    if way is not Way.PICKED:
        return ways.WAYS[way]
    if x.dtype in NARROW:
        return ways.WAYS[Way.FACTORED]
    (out, rank), inn = delta.b.shape, delta.a.shape[1]
    training = torch.is_grad_enabled()
    trained = [t for t in (delta.a, delta.b, delta.mid, delta.out) if t is not None and t.requires_grad]
    shape = ways.Shape(
        tokens=x.numel() // max(inn, 1),
        inn=inn,
        out=out,
        rank=rank,
        vectors=training and bool(trained),
        input=training and x.requires_grad,
        trained_a=delta.a.requires_grad,
    )
    if slot.inputs is not None:
        shared = slot.inputs[0]
        shape = shape._replace(sharers=len(shared.outs), mean_out=shared.mean_out)
    if type(shape.tokens) is not int:  # a tracer's symbol: the graph is to serve any number of tokens
        return ways.WAYS[Way.FACTORED]
    return ways.pick(shape) if torch.compiler.is_compiling() else _picked(shape)


_picked = lru_cache(4096)(ways.pick)


def _loses(weight: Tensor | Callable[[], Tensor], delta: LowRank, factors: Factors) -> bool:
    if torch.compiler.is_compiling():
        return True
    read = weight() if callable(weight) else weight
    return lowrank.swallowed(read, delta.a, factors) > LOST
