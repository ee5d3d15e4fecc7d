"""A layer's parameters with all changes in them: for layers that run with these, and for readers (reading.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..deltas import Delta, Residual, Shift
from ..errors import UnsupportedError
from ..kernels.lowrank import accumulate_dtype
from ..storage import Kept
from . import in_order
from .in_order import OrderedLayer
from .reading import Recipe
from .slot import Slot

__all__ = ["ChangedLayer", "deltas_of", "recipe", "substitutes"]

Changes = Sequence[tuple[Slot, Delta]]


class ChangedLayer(OrderedLayer, Protocol):
    """What is needed of a layer: an ``AdaptedLayer``, which stands above this file."""

    @property
    def kept(self) -> Kept:
        """The base's own parameters while adapters are merged; else empty."""

    def base_tensors(self) -> tuple[Tensor, ...]:
        """The parameters of the base layer."""

    def compute_device(self) -> torch.device:
        """Where it computes."""

    def _total_shift(self, slots: Sequence[Slot], deltas: Changes) -> Tensor | None:
        """The sum of what is added to the bias, but for what a rescaling adds."""

    def ran(self, slots: Sequence[Slot]) -> None:
        """``slots`` have acted."""


def deltas_of(slots: Sequence[Slot]) -> list[tuple[Slot, Delta]]:
    """The slots that have a delta, with it."""
    deltas: list[tuple[Slot, Delta]] = []  # a plain loop: torch.compile follows it
    for slot in slots:
        delta = slot.delta()
        if delta is not None:
            deltas.append((slot, delta))
    return deltas


def substitutes(layer: ChangedLayer, slots: Sequence[Slot], deltas: Changes) -> dict[str, Any]:
    """The layer's parameters with all changes in them, built for one step, by their names in the layer."""
    if in_order.ordered(layer, slots):
        return in_order.built(layer)
    found: dict[str, Any] = {}
    own = [delta for _, delta in deltas if not isinstance(delta, (Residual, Shift))]
    if own:
        standing = _stand_in(layer, own)
        found[layer.storage.weight_name] = _weight(layer, own) if standing is None else standing
    bias = _bias(layer, slots, deltas)
    if bias is not None:
        found[layer.storage.bias_name] = bias
    return found


def _stand_in(layer: ChangedLayer, own: Sequence[Delta]) -> Any:
    """What multiplies in the place of the weight; None where the layer's kind has none."""
    storage, module = layer.storage, layer.base_layer
    base = storage.read(module, layer.kept) if layer.kept else None
    return layer.kind.stand_in(module, storage.read(module), base, own)


def _weight(layer: ChangedLayer, own: Sequence[Delta]) -> Tensor:
    """The weight of now, in the module's layout, with changes in it."""
    kind, module, dtype = layer.kind, layer.base_layer, layer.compute_dtype()
    wide = accumulate_dtype(dtype)
    base = layer.base_matrix().to(wide)  # (out, in)
    total = kind.canonical(module, layer.storage.read(module)).to(wide) if layer.kept else base
    for delta in own:
        change = delta.weight_change(base)
        total = total if change is None else total + change
    return kind.native(module, total).to(dtype)


def _bias(layer: ChangedLayer, slots: Sequence[Slot], deltas: Changes) -> Tensor | None:
    """The bias of now with changes in it; None where nothing changes it."""
    bias, held = layer.base_bias(), layer.storage.read_bias(layer.base_layer)
    shifts = [] if (total := layer._total_shift(slots, deltas)) is None else [total]
    for _, delta in deltas:  # a plain loop: torch.compile follows it
        change = None if isinstance(delta, (Residual, Shift)) else delta.bias_change(bias)
        if change is not None:
            shifts.append(change)
    if not shifts:
        return None
    changed = sum(shifts[1:], shifts[0])
    if held is None:
        return changed.to(layer.compute_dtype())
    return (held + layer.kind.native_bias(layer.base_layer, changed)).to(held.dtype)


def recipe(layer: ChangedLayer, held: Tensor | None, slots: Sequence[Slot], bias: bool, routed: bool) -> Recipe:
    """How the weight, or the bias, is made for who reads it, with the changes of ``slots`` in it.

    Args:
        layer: whose it is.
        held: the Parameter that is there; None for a bias that comes with an adapter.
        slots: those that change what is read.
        bias: whether it is the bias.
        routed: whether rows of the batch go to different adapters.

    """

    def own() -> list[Delta]:
        return [delta for _, delta in deltas_of(slots) if not isinstance(delta, Shift)]

    then = layer._state.adapters

    def make() -> Tensor:
        layer.ran(slots)
        if in_order.ordered(layer, slots):
            if layer._state.adapters is not then:
                raise UnsupportedError(
                    "which adapters are active or merged was changed between a forward that read a layer's weight and "
                    "its backward, where one of several rescales; change it after the backward"
                )
            name = layer.storage.bias_name if bias else layer.storage.weight_name
            return cast(Tensor, in_order.built(layer).get(name, held))
        if not bias:
            return _weight(layer, own())
        changed = _bias(layer, slots, deltas_of(slots))
        return cast(Tensor, held if changed is None else changed)

    def factored() -> Any:
        layer.ran(slots)
        return _stand_in(layer, own())

    refusal = None if bias else _refusal(layer, slots)
    if routed:
        refusal = "is one for all rows of a batch, so they cannot go to different adapters here; run one at a time"
    if refusal is not None:
        what = f"{slots[0].site.name!r}: the code around this {type(layer.base_layer).__name__} computes with its "
        refusal = f"{what}{'bias' if bias else 'weight'} itself, which {refusal}, or leave the layer out"
    quantised = not bias and not layer.storage.lossless
    like = _like(layer, held, quantised)
    stands = not bias and layer.kind.parameter is not None and not in_order.ordered(layer, slots)
    trained = _trained(layer, slots) if torch.is_grad_enabled() else ()
    return Recipe(held, make, trained, like, refusal, quantised, factored if stands else None)


def _trained(layer: ChangedLayer, slots: Sequence[Slot]) -> tuple[Tensor, ...]:
    """What gradients of a value with the changes of ``slots`` go to."""
    held = [*layer.base_tensors()]
    for slot in slots:
        held += [parameter for parameter in slot._parameters.values() if parameter is not None]
        if slot.shared.trained:
            held += slot.shared.trained.values()
    return tuple({id(tensor): tensor for tensor in held if tensor.requires_grad}.values())


def _like(layer: ChangedLayer, held: Tensor | None, quantised: bool) -> tuple[torch.Size, torch.dtype, torch.device]:
    if held is None:  # it is built at once
        return torch.Size(), layer.compute_dtype(), layer.compute_device()
    if not quantised:
        return held.shape, held.dtype, held.device
    kind, module = layer.kind, layer.base_layer
    shape = kind.native(module, torch.empty(kind.features(module), device="meta")).shape
    return shape, layer.compute_dtype(), layer.compute_device()


def _refusal(layer: ChangedLayer, slots: Sequence[Slot]) -> str | None:
    """Why a weight with these changes in it does not do what the layer would."""
    for slot in slots:
        if slot.method is not None and slot.method.makes is Residual:
            return f"has no place for what {slot.method.name} adds to the output; adapt the module around it"
        if slot.drops and layer.kind.takes_dropout:
            return "leaves no input of the adapter's own for its dropout to act on; set the dropout to 0"
    return None
