"""Several adapters in one layer of which one rescales: each on what the one before left, in the order of activation.

Changes that add up need no order. A rescaling one (DoRA, IA3) scales what is there: the base's weight, and all that
came before. So merging some of the active adapters never changes the output: the order is theirs, whoever is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..deltas import Delta, Full, LowRank, Rescale, Residual
from ..kernels.lowrank import accumulate_dtype, scale_features
from ..kinds import LayerKind
from ..storage import Storage
from .active_adapters import ActiveState
from .slot import Slot

__all__ = ["bias_with", "built", "changed", "ordered", "pairs", "run", "weight_with"]

Pair = tuple[Slot, "Delta | None"]


class OrderedLayer(Protocol):
    """What is needed of a layer: an ``AdaptedLayer``, which stands above this file."""

    _state: ActiveState

    @property
    def kind(self) -> LayerKind:
        """How the layer's weight is seen as a matrix."""

    @property
    def storage(self) -> Storage:
        """How it is kept."""

    @property
    def base_layer(self) -> nn.Module:
        """The layer without adapters."""

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters whose deltas are in the weight now."""

    def slot(self, adapter: str) -> Slot | None:
        """The part of ``adapter`` in this layer, or None."""

    def base_matrix(self, dtype: torch.dtype | None = None, gather: bool = False) -> Tensor:
        """The base weight as the canonical matrix (out, in)."""

    def base_bias(self) -> Tensor | None:
        """The base layer's own bias (out,)."""

    def compute_dtype(self) -> torch.dtype:
        """In which the layer computes."""

    def flat(self, bias: Tensor) -> Tensor:
        """A stored bias as (out,)."""

    def added(self, slot: Slot, delta: LowRank | Full, x: Tensor, y: Tensor, cols: Tensor | None) -> Tensor:
        """``y`` and the change's matrix, or it times diag(cols), times x."""

    def run_deltas(self, deltas: Sequence[tuple[Slot, Delta]], x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        """``y`` with the changes in it, but for those of the bias."""


def ordered(layer: OrderedLayer, live: Sequence[Slot]) -> bool:
    """Whether the order of the live and merged adapters matters."""
    if len(live) + len(layer.merged) < 2:
        return False
    merged = [slot for name in layer.merged if (slot := layer.slot(name)) is not None]
    return any(slot.method is not None and slot.method.makes is Rescale for slot in (*live, *merged))


def pairs(layer: OrderedLayer, names: Sequence[str], active: Sequence[str]) -> list[Pair]:
    """Slots and deltas of those of ``names`` that are in the layer: the inactive ones first, then as in ``active``."""
    order = sorted(dict.fromkeys(names), key=lambda name: active.index(name) if name in active else -1)
    return [(slot, slot.delta()) for name in order if (slot := layer.slot(name)) is not None]


def weight_with(base: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """The canonical matrix ``base`` (out, in) with the changes in it, one after the other."""
    total = base
    for delta in deltas:
        change = delta.weight_change(total)
        total = total if change is None else total + change
    return total


def bias_with(
    base: Tensor | None,
    changes: Sequence[Pair],
    flat: Callable[[Tensor], Tensor],
    trained: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    """The bias (out,) with the changes in it, one after the other; None where there is none, and none is added.

    Args:
        base: the base's.
        changes: each adapter's slot and delta.
        flat: a stored bias as (out,).
        trained: the bias that each has trained, or None; by default, what its slot holds.

    """
    if trained is None:
        trained = [slot.trained_bias for slot, _ in changes]
    total = None if base is None else flat(base)
    for (_, delta), own in zip(changes, trained):
        change = None if delta is None else delta.bias_change(total)
        if change is not None:
            total = change if total is None else total + change
        if own is not None and base is not None and total is not None:
            total = total + flat(own - base)
    return total


def run(layer: OrderedLayer, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output with all live and merged deltas, one after the other, over the base's own weight."""
    kind = layer.kind
    all_pairs = pairs(layer, (*layer.merged, *layer._state.now().live), layer._state.active)
    output = kind.call(layer.base_layer, None, args, kwargs)
    return kind.with_tensor(output, changed(layer, all_pairs, x, kind.tensor_of(output).dtype))


def changed(
    layer: OrderedLayer,
    changes: Sequence[Pair],
    x: Tensor,
    dtype: torch.dtype,
    trained: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The output (..., out) in ``dtype`` with all ``changes``, one after the other; ``trained``: see bias_with()."""
    kind = layer.kind
    deltas = [(slot, delta) for slot, delta in changes if delta is not None]
    linear = [(slot, delta) for slot, delta in deltas if not isinstance(delta, Residual)]
    y = _linear(layer, layer.base_matrix(), linear, x, None)
    if (bias := bias_with(layer.base_bias(), changes, layer.flat, trained)) is not None:
        y = y + kind.spread(bias, y).to(y.dtype)
    last = [(slot, delta) for slot, delta in deltas if isinstance(delta, Residual)]
    return layer.run_deltas(last, x, None, y.to(dtype))


def built(layer: OrderedLayer) -> dict[str, Any]:
    """The layer's parameters with all live and merged deltas in them, by their names in the layer."""
    storage, dtype = layer.storage, layer.compute_dtype()
    all_pairs = pairs(layer, (*layer.merged, *layer._state.now().live), layer._state.active)
    own = [delta for _, delta in all_pairs if delta is not None and not isinstance(delta, Residual)]
    total = weight_with(layer.base_matrix().to(accumulate_dtype(dtype)), own)
    found: dict[str, Any] = {storage.weight_name: layer.kind.native(layer.base_layer, total).to(dtype)}
    bias = bias_with(layer.base_bias(), all_pairs, layer.flat)
    return found if bias is None else {**found, storage.bias_name: bias.to(dtype)}


def _linear(
    layer: OrderedLayer, weight: Tensor, deltas: Sequence[tuple[Slot, Delta]], x: Tensor, cols: Tensor | None
) -> Tensor:
    """The output without its bias (..., out): ``weight`` (out, in) with ``deltas``, times diag(cols), times x."""
    kind, module = layer.kind, layer.base_layer
    if not deltas:
        return kind.run(module, x, weight, cols)
    *before, (slot, delta) = deltas
    if isinstance(delta, (LowRank, Full)):
        dropped = slot.drop(x) if kind.takes_dropout else x
        return layer.added(slot, delta, dropped, _linear(layer, weight, before, x, cols), cols)
    if not isinstance(delta, Rescale):
        return _linear(layer, weight, before, x, cols)
    inner = cols if delta.cols is None else delta.cols if cols is None else cols * delta.cols
    dropped = slot.drop(x) if delta.inner is not None and kind.takes_dropout else x
    if dropped is x:
        return _scaled(layer, slot, delta, x, _linear(layer, weight, before, x, inner), inner)
    # As in PEFT's DoRA, the whole change takes the input after dropout, and is one of the base alone.
    new = _scaled(layer, slot, delta, dropped, kind.run(module, dropped, weight, inner), inner)
    return _linear(layer, weight, before, x, cols) + (new - kind.run(module, dropped, weight, cols))


def _scaled(layer: OrderedLayer, slot: Slot, delta: Rescale, x: Tensor, y: Tensor, cols: Tensor | None) -> Tensor:
    if delta.inner is not None:
        y = layer.added(slot, delta.inner, x, y, cols)
    return y if delta.rows is None else scale_features(y, layer.kind.spread(delta.rows, y), 1.0)
