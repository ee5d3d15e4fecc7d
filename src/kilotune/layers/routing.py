"""Rows of one batch through different adapters: how one layer runs a route (route.py).

A layer runs its base once, on all rows. Then each cohort changes its own rows: in one pass where the deltas stack (the
same frozen factors, or factors of a plain product), else adapter by adapter on the rows of each. Rows of the base alone
are not touched.

Where rows run a stack, this happens level after level, each on what the one before left; an adapter beneath many is one
cohort over all their rows. Changes that add up need no more than that. Where one in a stack rescales what is beneath
it, or what is beneath is not linear, a row's adapters act together, as those of a model that are active (in_order.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..deltas import Delta, Full, LowRank, Rescale, Residual, Role, Shift
from ..errors import UnsupportedError
from ..kernels.banked import Owners, lift_own, lift_shared, per_row
from ..kinds import hooked
from . import in_order
from .in_order import OrderedLayer
from .route import Cohort, Route, RoutedLayer
from .slot import BIAS, Slot, slot_key

__all__ = ["bias_difference", "changed_rows", "run_saved"]


def changed_rows(layer: OrderedLayer, route: Route, x: Tensor, y: Tensor) -> Tensor:
    """``y`` (rows first), with the changes of each row's adapters in it.

    Args:
        layer: the adapted layer.
        route: who the rows belong to.
        x: the layer's input.
        y: the base layer's output for it.

    """
    kind, module = layer.kind, layer.base_layer
    found = [[cohort for cohort in level if cohort.slot(layer) is not None] for level in route.levels]
    here = [level for level in found if level]
    if not here:
        return y
    features = 0 if kind.input_features(module) == 0 and not x.is_floating_point() else 1
    where = f"{type(module).__name__} {_name(here[0][0], layer)!r}"
    axes, times = route.layout(x, y, features, where)
    flat_y = y if axes == 1 else y.flatten(0, axes - 1)
    if len(here) > 1 and _as_one(layer, here):
        return _each_chain(layer, route, times, route.own(x, axes, None, None), flat_y).view(y.shape)
    for level in here:
        flat_y = _on_level(layer, route, level, (axes, times), x, flat_y)
    return flat_y.view(y.shape)


def _on_level(
    layer: RoutedLayer, route: Route, level: list[Cohort], layout: tuple[int, int], x: Tensor, flat_y: Tensor
) -> Tensor:
    """``flat_y`` (rows, ..., out) with the changes of one level. layout: see :meth:`Route.layout`."""
    axes, times = layout
    total = flat_y.shape[0]
    pieces, places = [], []
    for cohort in level:
        rows, owners = cohort.spread(times, x.device)
        whole = rows.shape[0] == total
        own_x = route.own(x, axes, None if whole else cohort, None if whole else rows)
        own_y = flat_y if whole else flat_y.index_select(0, rows)
        new = _changed(layer, cohort, owners, own_x, own_y)
        if whole:
            return new
        pieces.append(new)
        places.append(rows)
    return flat_y.index_copy(0, torch.cat(places), torch.cat(pieces))


# -- adapters on others that act together ------------------------------------------------------------


def _as_one(layer: RoutedLayer, levels: list[list[Cohort]]) -> bool:
    """Whether an adapter of some level may not simply act on what those below it have left."""
    if any(_makes(layer, cohort) is Residual for level in levels[:-1] for cohort in level):
        return True
    rescaling = [cohort for level in levels[1:] for cohort in level if _makes(layer, cohort) is Rescale]
    return not all(_scales_output(layer, cohort) for cohort in rescaling)


def _scales_output(layer: RoutedLayer, cohort: Cohort) -> bool:
    """Whether a rescaling does no more than to scale what the layer gives, whatever is in that."""
    slot = cohort.slot(layer, 0) or cohort.slot(layer)
    if slot is None or slot.method is None or hooked(layer.base_layer):
        return False
    params = cohort.params(layer, 0)
    if any(slot.method.roles.get(key) is not Role.ROWS for key in params):
        return False  # to ask for the delta could cost much, too
    delta = slot.delta_with(params, cohort.shared(layer, 0))
    return isinstance(delta, Rescale) and delta.inner is None is delta.cols and delta.scale_bias


def _makes(layer: RoutedLayer, cohort: Cohort) -> type[Delta] | None:
    slot = cohort.slot(layer)
    return None if slot is None or slot.method is None else slot.method.makes


def _each_chain(layer: OrderedLayer, route: Route, times: int, x: Tensor, y: Tensor) -> Tensor:
    """The rows (rows first) of one stack after the other."""
    pieces, places = [], []
    for chain in route.chains():
        parts = [(cohort, which) for cohort, which in chain.parts if cohort.slot(layer) is not None]
        if not parts:
            continue
        rows = chain.spread(times, y.device)
        whole = rows.shape[0] == y.shape[0]
        own_x, own_y = (x, y) if whole else (x.index_select(0, rows), y.index_select(0, rows))
        new = _stack(layer, parts, own_x, own_y)
        if whole:
            return new
        pieces.append(new)
        places.append(rows)
    return y if not pieces else y.index_copy(0, torch.cat(places), torch.cat(pieces))


def _stack(layer: OrderedLayer, parts: list[tuple[Cohort, int]], x: Tensor, y: Tensor) -> Tensor:
    """The rows of one stack."""
    if len(parts) == 1 or not _as_one(layer, [[cohort] for cohort, _ in parts]):
        for cohort, which in parts:
            y = _changed_by_one(layer, cohort, which, x, y)
        return y
    changes, trained = [], []
    for cohort, which in parts:
        slot, delta, bias = _change(layer, cohort, which)
        trained.append(bias)
        changes.append((slot, delta))
    return in_order.changed(layer, changes, x, y.dtype, trained)


def _change(layer: RoutedLayer, cohort: Cohort, which: int | None) -> tuple[Slot, Delta | None, Tensor | None]:
    """(slot, delta, trained bias) of adapter ``which``, or with None those of all, stacked in front."""
    slot = cohort.slot(layer, which) or cohort.slot(layer)
    assert slot is not None
    params = cohort.params(layer, which)
    bias = params.pop(BIAS, None)
    return slot, slot.delta_with(params, cohort.shared(layer, which)), bias


# -- a cohort ------------------------------------------------------------------------------------------


def _name(cohort: Cohort, layer: RoutedLayer) -> str:
    slot = cohort.slot(layer)
    return "" if slot is None else slot.site.name


def _changed(layer: RoutedLayer, cohort: Cohort, owners: Owners, x: Tensor, y: Tensor) -> Tensor:
    """The rows of one cohort: x (M, ...), y (M, ..., out)."""
    slot = cohort.slot(layer)
    assert slot is not None
    method = slot.method
    if len(cohort.names) > 1 and (method is None or method.stacks):
        changed = _stacked(layer, *_change(layer, cohort, None), owners, x, y)
        if changed is not None:
            return changed
    rows_alike = len(cohort.names) > 1 and method is not None and method.by_rows
    if rows_alike and layer.kind.is_plain(layer.base_layer, x, y):
        return _by_rows(layer, slot, cohort, owners, x, y)
    pieces, places = [], []
    for which in range(len(cohort.names)):
        rows = None if len(cohort.names) == 1 else (owners.index == which).nonzero().squeeze(1)
        own_x, own_y = (x, y) if rows is None else (x.index_select(0, rows), y.index_select(0, rows))
        new = _changed_by_one(layer, cohort, which, own_x, own_y)
        if rows is None:
            return new
        pieces.append(new)
        places.append(rows)
    return torch.empty_like(y).index_copy(0, torch.cat(places), torch.cat(pieces))


def _changed_by_one(layer: RoutedLayer, cohort: Cohort, which: int, x: Tensor, y: Tensor) -> Tensor:
    """The rows of one adapter."""
    kind, module = layer.kind, layer.base_layer
    slot, delta, bias = _change(layer, cohort, which)
    base = None if hooked(module) else y  # a hook may have made something else of it
    shifts = [] if bias is None else [bias_difference(layer, bias)]
    if isinstance(delta, Shift):
        shifts.append(delta.bias)
    for shift in shifts:
        # Not spread(): a group norm has its features on axis 1, a LayerNorm of two axes on both.
        wide = shift.to(y.dtype).expand_as(kind.features_last(module, y))
        y = y + kind.features_back(module, wide)
    return y if delta is None else layer.run_deltas([(slot, delta)], x, base, y)


def _by_rows(layer: RoutedLayer, slot: Slot, cohort: Cohort, owners: Owners, x: Tensor, y: Tensor) -> Tensor:
    """All rows in one pass, by a change that acts on each with the row's own numbers."""

    def own(value: Tensor) -> Tensor:
        """Of (adapters, ...) each row's own, so that it broadcasts: (M, 1..., ...)."""
        return value.index_select(0, owners.index).view(x.shape[0], *(1,) * (x.ndim - 2), *value.shape[1:])

    params, shared = cohort.params(layer), cohort.shared(layer)
    bias = params.pop(BIAS, None)
    held = shared.holding({name: own(value) for name, value in shared.trained.items()}) if shared.trained else shared
    delta = slot.delta_with({name: own(value) for name, value in params.items()}, held)
    assert isinstance(delta, Full)
    assert delta.act is not None
    y = y + delta.act(slot.drop(x) if layer.kind.takes_dropout else x).to(y.dtype)
    return y if bias is None else y + per_row(owners.take(bias_difference(layer, bias)), y, -1).to(y.dtype)


def bias_difference(layer: RoutedLayer, bias: Tensor) -> Tensor:
    """What trained biases (..., out), which are kept whole, change."""
    base = layer.base_bias()
    assert base is not None
    return bias - base


def _stacked(
    layer: RoutedLayer, slot: Slot, delta: Delta | None, bias: Tensor | None, owners: Owners, x: Tensor, y: Tensor
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
    """A module that adapters train whole: the rows of adapters with a copy run through it, the others as they would.

    The original sees all rows, since layers in it may be adapted by others of the batch, and they count the rows.

    Raises:
        UnsupportedError: the module's input is not the rows, or what it returns is not one tensor.

    """
    groups = _groups(route, copies)
    if not groups:  # nobody in this batch has a copy: whatever it takes and gives
        return original(*args, **kwargs)
    x = args[0] if args and isinstance(args[0], Tensor) else None
    where = f"the {type(original).__name__} that adapters replace"
    if x is None or len(args) > 1 or kwargs:
        raise UnsupportedError(f"{where}: rows can be told apart where it takes one tensor alone")
    axes, times = route.layout(x, x, int(x.is_floating_point()), where)  # ids have no axis of features
    flat = x if axes == 1 else x.flatten(0, axes - 1)
    pieces, places = [], []
    for module, rows in groups:
        own = rows if times == 1 else (rows.unsqueeze(1) * times + torch.arange(times, device=rows.device)).flatten()
        pieces.append(_one_tensor(module(flat.index_select(0, own)), where))
        places.append(own)
    own, joined = torch.cat(places), torch.cat(pieces)
    if len(own) == len(flat):
        result = torch.empty_like(joined).index_copy(0, own, joined)
        return result.view(*x.shape[:axes], *result.shape[1:])
    others = _one_tensor(original(x), where)
    shape = others.shape
    if axes > 1:
        others = others.flatten(0, axes - 1)
    return others.index_copy(0, own, joined.to(others.dtype)).view(shape)


def _one_tensor(output: Any, where: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    raise UnsupportedError(f"{where}: returns a {type(output).__name__}, of which rows cannot be told apart")


def _groups(route: Route, copies: nn.ModuleDict) -> list[tuple[nn.Module, Tensor]]:
    """(copy, rows) for each adapter of the batch that has a copy; of several in a stack, the upper one's runs."""
    found: list[tuple[nn.Module, Tensor]] = []
    taken: list[Tensor] = []  # rows of levels above
    for level in reversed(route.levels):
        own = [
            (copies[key], cohort.rows[cohort.index == which])
            for cohort in level
            for which, name in enumerate(cohort.names)
            if (key := slot_key(name)) in copies
        ]
        if taken and own:
            above = torch.cat(taken)
            own = [(copy, rows[~torch.isin(rows, above)]) for copy, rows in own]
        found += own
        taken += [rows for _, rows in own]
    return found
