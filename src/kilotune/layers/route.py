"""What a route is: which adapter each row of a batch goes to. How a layer runs one is in routing.py.

::

    Route       who each row (or each token of packed rows) belongs to; adapters of one kind together in a Cohort
    Cohort      n adapters of one method and configuration, and which rows are theirs
      Stacked     adapters in the model, whose vectors are stacked: one pass for all of them (kernels/banked.py)
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, final

import torch
from torch import Tensor, nn

from ..deltas import Delta
from ..errors import UnsupportedError
from ..kernels.banked import Owners
from ..kinds import LayerKind
from .slot import Slot

__all__ = ["Cohort", "Route", "RoutedLayer", "Stacked"]


class RoutedLayer(Protocol):
    """What a route needs of a layer that it runs in: an ``AdaptedLayer``, which stands above this file."""

    @property
    def kind(self) -> LayerKind:
        """How the layer's weight is seen as a matrix."""

    @property
    def base_layer(self) -> nn.Module:
        """The layer without adapters."""

    def slot(self, adapter: str) -> Slot | None:
        """The part of ``adapter`` in this layer, or None."""

    def base_bias(self) -> Tensor | None:
        """The base layer's own bias (out,)."""

    def run_deltas(self, deltas: Sequence[tuple[Slot, Delta]], x: Tensor, base: Tensor | None, y: Tensor) -> Tensor:
        """``y`` with the changes in it, but for those of the bias."""


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
    def slot(self, layer: RoutedLayer, which: int | None = None) -> Slot | None:
        """The slot in ``layer`` that says what adapter ``which`` is there, or with None what they all are.

        None where they do not change the layer.
        """

    @abstractmethod
    def params(self, layer: RoutedLayer, which: int | None = None) -> dict[str, Tensor]:
        """The parameters in ``layer`` of adapter ``which``, or with None those of all, stacked in front."""


@final
class Stacked(Cohort):
    """Adapters that are in the model."""

    def slot(self, layer: RoutedLayer, which: int | None = None) -> Slot | None:
        return layer.slot(self.names[which or 0])

    def params(self, layer: RoutedLayer, which: int | None = None) -> dict[str, Tensor]:
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

    def slots(self, layer: RoutedLayer) -> list[Slot]:
        """The slots that change ``layer`` for some of the rows."""
        return [slot for cohort in self.cohorts if (slot := cohort.slot(layer)) is not None]

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


def _picked(x: Tensor, axes: int, rows: Tensor | None) -> Tensor:
    flat = x if axes == 1 else x.flatten(0, axes - 1)
    return flat if rows is None else flat.index_select(0, rows)
