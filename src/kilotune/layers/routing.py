"""Rows of one batch through different adapters: what a route is, and how one layer runs it.

::

    Route       who each row (or each token of packed rows) belongs to; adapters of one kind together in a Cohort
    Cohort      n adapters of one method and configuration, and which rows are theirs
      Stacked     their vectors are stacked: one pass for all of them (kernels/banked.py)
    rows_of     which axis of a layer's input the rows are on, or an error: never a guess

A layer runs its base once, on all rows. Then each cohort changes its own rows: in one pass where the deltas stack (the
same frozen factors, or factors of a plain product), else adapter by adapter on the rows of each. Rows of the base alone
are not touched.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from .deltas import Delta, LowRank, Shift
from .errors import UnsupportedError
from .kernels.banked import Owners, lift_own, lift_shared, per_row
from .slots import BIAS, Slot, slot_key
from .stacks import delta_of

if TYPE_CHECKING:
    from .layer import AdaptedLayer

__all__ = ["Cohort", "Route", "Stacked", "changed_rows", "run_saved"]


class Cohort(ABC):
    """Adapters of one kind, and their rows.

    names: the adapters. rows: which rows of the route are theirs, (M,) int64, rising. index: (M,) int64, which of
    ``names`` each of these belongs to. aligned: ``index`` is known to be 0, 1, ..., M - 1.
    """

    def __init__(self, names: tuple[str, ...], rows: Tensor, index: Tensor, aligned: bool = False) -> None:
        self.names, self.rows, self.index = names, rows, index
        self._owners = Owners(index, len(names), 1) if aligned else Owners.of(index, len(names))
        self._spread: dict[tuple[int, torch.device], tuple[Tensor, Owners]] = {}

    def spread(self, times: int, device: torch.device) -> tuple[Tensor, Owners]:
        """``rows`` and who they belong to where each row of the route stands ``times`` times, one after the other."""
        if (times, device) not in self._spread:
            own = torch.arange(times, device=self.rows.device)
            rows = (self.rows.unsqueeze(1) * times + own).flatten().to(device)
            self._spread[times, device] = rows, self._owners.spread(times, device)
        return self._spread[times, device]

    @abstractmethod
    def slot(self, layer: AdaptedLayer, which: int | None = None) -> Slot | None:
        """The slot in ``layer`` that says what adapter ``which`` is there, or with None what they all are.

        None where they do not change the layer.
        """

    @abstractmethod
    def params(self, layer: AdaptedLayer, which: int | None = None) -> dict[str, Tensor]:
        """The parameters in ``layer`` of adapter ``which``, or with None those of all, stacked in front."""


@final
class Stacked(Cohort):
    """Adapters that are in the model."""

    def slot(self, layer: AdaptedLayer, which: int | None = None) -> Slot | None:
        return layer.slot(self.names[which or 0])

    def params(self, layer: AdaptedLayer, which: int | None = None) -> dict[str, Tensor]:
        if which is not None:
            slot = self.slot(layer, which)
            return {} if slot is None else _held(slot)
        held = [_held(slot) for name in self.names if (slot := layer.slot(name)) is not None]
        if len(held) == 1:
            return {key: value.unsqueeze(0) for key, value in held[0].items()}
        return {key: torch.stack([one[key] for one in held]) for key in held[0]}


def _held(slot: Slot) -> dict[str, Tensor]:
    return {key: value for key, value in slot._parameters.items() if value is not None}


@final
class Route:
    """Which adapter each row of a batch goes to.

    Args:
        count: the number of rows; of tokens with ``tokens``.
        cohorts: the adapters; a row of none of them runs the base alone.
        tokens: the rows are packed: what is routed are tokens, in the order in which they stand.
        multiples: a layer may see each row several times, one after the other (beams of a generation).

    """

    def __init__(self, count: int, cohorts: Sequence[Cohort], tokens: bool = False, multiples: bool = False) -> None:
        self.count, self.cohorts, self.tokens, self.multiples = count, tuple(cohorts), tokens, multiples
        self.names = frozenset(name for cohort in cohorts for name in cohort.names)
        self._seen: tuple[weakref.ref[Tensor], int, dict[Cohort | None, Tensor]] | None = None

    def own(self, x: Tensor, axes: int, cohort: Cohort | None, rows: Tensor | None) -> Tensor:
        """``x`` with its leading axes as one, and of it ``rows`` (the cohort's), or all.

        Layers that are fed by the same tensor get the same tensor, so that they see that they share a product.
        """
        if x.is_inference() or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _picked(x, axes, rows)
        if self._seen is None or self._seen[0]() is not x or self._seen[1] != x._version:
            self._seen = (weakref.ref(x), x._version, {})
        made = self._seen[2]
        if cohort not in made:
            made[cohort] = _picked(x, axes, rows)
        return made[cohort]

    def layout(self, x: Tensor, y: Tensor, features: int, where: str) -> tuple[int, int]:
        """(leading axes of ``x`` and ``y`` that are to be one, times each row stands there).

        Args:
            x: a layer's input, y: its output.
            features: how many axes behind the rows' a token of ``x`` has: 1, or 0 where the input is ids.
            where: the layer, for the error.

        Raises:
            UnsupportedError: the rows of the route are not the rows of this input.

        """
        if self.tokens:
            axes = x.ndim - features
            if axes >= 1 and x.shape[:axes].numel() == self.count == y.shape[:axes].numel():
                return axes, 1
        elif x.ndim > 0 and y.shape[:1] == x.shape[:1]:
            times, rest = divmod(x.shape[0], self.count)
            flat = x.ndim == 1 + features  # (rows * tokens, in): in the order of the rows
            if not rest and (times == 1 or (times > 1 and (flat or self.multiples))):
                return 1, times
        what = "tokens" if self.tokens else "rows"
        raise UnsupportedError(
            f"{where}: the route has {self.count} {what}, and the layer's input has the shape {tuple(x.shape)}, where "
            "they cannot be told apart; give one name for each row of the batch (with lengths, for each segment of "
            "packed rows), or leave the layer out of the adapters"
        )


def changed_rows(layer: AdaptedLayer, route: Route, x: Tensor, y: Tensor) -> Tensor:
    """``y`` (rows first), with the changes of each row's adapter in it.

    Args:
        layer: the adapted layer.
        route: who the rows belong to.
        x: the layer's input.
        y: the base layer's output for it.

    """
    kind, module = layer.kind, layer.base_layer
    here = [cohort for cohort in route.cohorts if cohort.slot(layer) is not None]
    if not here:
        return y
    features = 0 if kind.input_features(module) == 0 and not x.is_floating_point() else 1
    where = f"{type(module).__name__} {_name(here[0], layer)!r}"
    axes, times = route.layout(x, y, features, where)
    flat_y = y if axes == 1 else y.flatten(0, axes - 1)
    total = flat_y.shape[0]
    pieces, places = [], []
    for cohort in here:
        rows, owners = cohort.spread(times, x.device)
        whole = rows.shape[0] == total
        own_x = route.own(x, axes, None if whole else cohort, None if whole else rows)
        own_y = flat_y if whole else flat_y.index_select(0, rows)
        new = _changed(layer, cohort, owners, own_x, own_y)
        if whole:
            return new.view(y.shape)
        pieces.append(new)
        places.append(rows)
    return flat_y.index_copy(0, torch.cat(places), torch.cat(pieces)).view(y.shape)


def _picked(x: Tensor, axes: int, rows: Tensor | None) -> Tensor:
    flat = x if axes == 1 else x.flatten(0, axes - 1)
    return flat if rows is None else flat.index_select(0, rows)


def _name(cohort: Cohort, layer: AdaptedLayer) -> str:
    slot = cohort.slot(layer)
    return "" if slot is None else slot.site.name


def _changed(layer: AdaptedLayer, cohort: Cohort, owners: Owners, x: Tensor, y: Tensor) -> Tensor:
    """The rows of one cohort: x (M, ...), y (M, ..., out)."""
    slot = cohort.slot(layer)
    assert slot is not None
    method = slot.method
    if len(cohort.names) > 1 and (method is None or method.stacks):
        params = cohort.params(layer)
        bias = params.pop(BIAS, None)
        delta = None if method is None else method.delta(slot.site, params, slot.shared)
        changed = _stacked(layer, slot, delta, bias, owners, x, y)
        if changed is not None:
            return changed
    pieces, places = [], []
    for which in range(len(cohort.names)):
        rows = None if len(cohort.names) == 1 else (owners.index == which).nonzero().squeeze(1)
        own_x, own_y = (x, y) if rows is None else (x.index_select(0, rows), y.index_select(0, rows))
        new = _changed_by_one(layer, cohort.slot(layer, which) or slot, cohort.params(layer, which), own_x, own_y)
        if rows is None:
            return new
        pieces.append(new)
        places.append(rows)
    return torch.empty_like(y).index_copy(0, torch.cat(places), torch.cat(pieces))


def _changed_by_one(layer: AdaptedLayer, slot: Slot, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The rows of one adapter."""
    kind = layer.kind
    bias = params.pop(BIAS, None)
    delta = None if slot.method is None else delta_of(slot.method, slot.site, params, slot.shared)
    base = y
    shifts = [] if bias is None else [bias_difference(layer, bias)]
    if isinstance(delta, Shift):
        shifts.append(delta.bias)
    for shift in shifts:
        y = y + kind.spread(shift, y).to(y.dtype)
    return y if delta is None else layer.run_deltas([(slot, delta)], x, base, y)


def bias_difference(layer: AdaptedLayer, bias: Tensor) -> Tensor:
    """What trained biases (..., out), which are kept whole, change."""
    base = layer.base_bias()
    assert base is not None
    return bias - base


def _stacked(
    layer: AdaptedLayer, slot: Slot, delta: Delta | None, bias: Tensor | None, owners: Owners, x: Tensor, y: Tensor
) -> Tensor | None:
    """All rows in one pass; None where the deltas' form or the layer's kind has none."""
    kind, module = layer.kind, layer.base_layer
    axis = kind.feature_axis(module, y)
    if axis is None or not isinstance(delta, (LowRank, Shift, type(None))):
        return None
    shifts = [] if bias is None else [bias_difference(layer, bias)]  # (n, out)
    if isinstance(delta, Shift):
        shifts.append(delta.bias)
    if isinstance(delta, LowRank):
        dropped = slot.drop(x) if kind.takes_dropout else x
        if delta.a.ndim == 2 and delta.b.ndim == 2:
            z = slot.first_product(dropped, delta.a, lambda: kind.project(module, dropped, delta.a))  # (M, ..., r)
            y = lift_shared(y, z, delta.b, delta.mid, delta.out, delta.scale, owners, axis)
        elif kind.is_product(module, dropped):
            y = y + lift_own(dropped, delta.a, delta.b, delta.mid, delta.out, delta.scale, owners).to(y.dtype)
        else:
            return None
    for shift in shifts:
        y = y + per_row(owners.take(shift), y, axis).to(y.dtype)
    return y


def run_saved(
    route: Route, copies: nn.ModuleDict, original: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """A module that adapters train whole: each row through its adapter's copy of it.

    Raises:
        UnsupportedError: the module's input is not the rows, or what it returns is not one tensor.

    """
    groups = _groups(route, copies)
    x = args[0] if args and isinstance(args[0], Tensor) else None
    where = f"the {type(original).__name__} that adapters replace"
    if x is None or len(args) > 1 or kwargs:
        raise UnsupportedError(f"{where}: rows can be told apart where it takes one tensor alone")
    pieces, places = [], []
    total = 0
    for module, rows in groups:
        axes, times = route.layout(x, x, 1, where)
        flat = x if axes == 1 else x.flatten(0, axes - 1)
        total = flat.shape[0]
        own = rows if times == 1 else (rows.unsqueeze(1) * times + torch.arange(times, device=rows.device)).flatten()
        piece = (original if module is None else module)(flat.index_select(0, own))
        if not isinstance(piece, Tensor):
            raise UnsupportedError(f"{where}: returns a {type(piece).__name__}, of which rows cannot be told apart")
        pieces.append(piece)
        places.append(own)
    joined = torch.cat(pieces)
    result = joined.new_empty(total, *joined.shape[1:]).index_copy(0, torch.cat(places), joined)
    return result if not route.tokens else result.view(*x.shape[:-1], *result.shape[1:])


def _groups(route: Route, copies: nn.ModuleDict) -> list[tuple[nn.Module | None, Tensor]]:
    """(module, rows) for each adapter with a copy, and last (None, the other rows)."""
    device = route.cohorts[0].rows.device if route.cohorts else torch.device("cpu")
    left = torch.ones(route.count, dtype=torch.bool, device=device)
    found: list[tuple[nn.Module | None, Tensor]] = []
    for cohort in route.cohorts:
        for which, name in enumerate(cohort.names):
            if (key := slot_key(name)) in copies:
                rows = cohort.rows[cohort.index == which]
                left[rows] = False
                found.append((copies[key], rows))
    rest = left.nonzero().squeeze(1)
    return [*found, (None, rest)] if rest.numel() else found
