"""What a route is: which adapter each row of a batch goes to. How a layer runs one is in routing.py.

::

    Route       who each row (or each token of packed rows) belongs to, level after level where adapters stand on others
    level       adapters of which each row has at most one; those of one kind together in a Cohort
    Cohort      n adapters of one method and configuration, and which rows are theirs
      Stacked     adapters in the model, whose vectors are stacked: one pass for all of them (kernels/banked.py)
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar, final

import torch
from torch import Tensor, nn

from ..deltas import Delta
from ..errors import UnsupportedError
from ..kernels.banked import Owners
from ..kinds import LayerKind
from ..methods import Shared
from .slot import Slot

__all__ = ["Chain", "Cohort", "Route", "RoutedLayer", "Stacked", "levels_of"]

Key = TypeVar("Key", bound=Hashable)


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

    @abstractmethod
    def shared(self, layer: RoutedLayer, which: int | None = None) -> Shared:
        """What adapter ``which`` has once for all its layers; with None what it trains of that is all's, stacked."""


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

    def shared(self, layer: RoutedLayer, which: int | None = None) -> Shared:
        found = [slot.shared for name in self.names if (slot := layer.slot(name)) is not None]
        if which is not None or not found[0].trained:
            return found[which or 0]
        return found[0].holding({key: torch.stack([one.trained[key] for one in found]) for key in found[0].trained})


def _held(slot: Slot) -> dict[str, Tensor]:
    return {key: value for key, value in slot._parameters.items() if value is not None}


def levels_of(chains: Iterable[Sequence[Key]]) -> dict[Key, int] | None:
    """A level for each key, so that they rise along each chain; the lowest that will do.

    Keys that stand on nothing are on level 0, whatever stands beside them, so that adapters of one form are one cohort
    wherever that is possible. None where it is not: a key stands on itself, or two on each other.
    """
    found: dict[Key, int] = {}
    steps: set[tuple[Key, Key]] = set()
    for chain in chains:
        found.update((key, 0) for key in chain)
        steps.update(pairwise(chain))
    for _ in found:
        raised = False
        for lower, upper in steps:
            if found[upper] <= found[lower]:
                found[upper], raised = found[lower] + 1, True
        if not raised:
            return found
    return found if not steps else None


@final
class Chain(NamedTuple):
    """The rows that run the same adapters. parts: (cohort, which of its adapters), bottom first. rows: (M,), rising."""

    parts: tuple[tuple[Cohort, int], ...]
    rows: Tensor

    def spread(self, times: int, device: torch.device) -> Tensor:
        """``rows`` where each row of the route stands ``times`` times, one after the other."""
        if times == 1:
            return self.rows.to(device)
        return (self.rows.unsqueeze(1) * times + torch.arange(times)).flatten().to(device)


@final
class Route:
    """Which adapter each row of a batch goes to, or which stack of them.

    Args:
        count: the number of rows; of tokens with ``tokens``.
        cohorts: the adapters; a row of none of them runs the base alone.
        tokens: the rows are packed: what is routed are tokens, in the order in which they stand.
        multiples: a layer may see each row several times, one after the other (beams of a generation).
        above: further levels, lower ones first. A row's adapter of a level changes what those below it have left.

    Attributes:
        levels: ``cohorts``, and those above; on each, a row is of one cohort at most. cohorts: all of them.

    """

    def __init__(
        self,
        count: int,
        cohorts: Sequence[Cohort],
        tokens: bool = False,
        multiples: bool = False,
        above: Sequence[Sequence[Cohort]] = (),
    ) -> None:
        self.count, self.tokens, self.multiples = count, tokens, multiples
        self.levels = (tuple(cohorts), *map(tuple, above))
        self.cohorts = tuple(cohort for level in self.levels for cohort in level)
        self.names = frozenset(name for cohort in self.cohorts for name in cohort.names)
        self._seen: tuple[weakref.ref[Tensor], int, dict[Cohort | None, Tensor]] | None = None
        self._chains: list[Chain] | None = None

    def chains(self) -> list[Chain]:
        """The rows of the route by what they run; rows of the base alone are in none."""
        if self._chains is None:
            parts: dict[int, list[tuple[Cohort, int]]] = {}
            for level in self.levels:
                for cohort in level:
                    for row, which in zip(cohort.rows.tolist(), cohort.index.tolist(), strict=True):
                        parts.setdefault(row, []).append((cohort, which))
            rows: dict[tuple[tuple[Cohort, int], ...], list[int]] = {}
            for row in sorted(parts):
                rows.setdefault(tuple(parts[row]), []).append(row)
            self._chains = [Chain(own, torch.tensor(places)) for own, places in rows.items()]
        return self._chains

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
