"""Merging on the whole model: all layers or none, checks before anything is changed, and what rounding took."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from .errors import MergeError, gather
from .layer import AdaptedLayer
from .slots import ActiveState

__all__ = ["MergePrecisionWarning", "all_or_nothing", "base_weights", "check_finite", "check_mergeable", "warn_of_loss"]

LOST_BOUND = 0.05


class MergePrecisionWarning(UserWarning):
    """Merging rounded a good part of the adapter away, because the weights' dtype is narrow (16-bit) for it."""


@contextmanager
def all_or_nothing(layers: Mapping[str, AdaptedLayer], state: ActiveState) -> Iterator[None]:
    """Out of memory, or Ctrl-C, in the midst of merging: go back to where it began, allocating nothing."""
    before = [(layer, layer.snapshot()) for layer in layers.values()]
    active, merged = state.active, state.merged
    try:
        yield
    except BaseException:
        for layer, held in before:
            layer.restore(held)
        state.active, state.merged = active, merged
        raise


@contextmanager
def base_weights(layers: Mapping[str, AdaptedLayer]) -> Iterator[None]:
    """Inside, the layers have the base's weights, whatever is merged."""
    merged = [layer for layer in layers.values() if layer.merged]
    for layer in merged:
        layer.suspend_merge()
    try:
        yield
    finally:
        for layer in merged:
            layer.resume_merge()


def check_mergeable(layers: Mapping[str, AdaptedLayer], names: Sequence[str]) -> None:
    """Raise MergeError where one of ``names`` cannot be merged."""
    for where, layer in layers.items():
        layer.check_mergeable(names, where)


def check_finite(layers: Mapping[str, AdaptedLayer], names: Sequence[str]) -> None:
    """Raise MergeError if merging ``names`` would give a value that is not finite; changes nothing."""
    broken = []
    for where, layer in layers.items():
        result = layer.merged_with([*layer.merged, *names])
        values = [v.to(layer.compute_dtype()) for v in (result.weight, result.bias) if v is not None]
        if not all(bool(torch.isfinite(v).all()) for v in values if v.device.type != "meta"):
            broken.append(f"{where}: the merged weight would hold values that are not finite")
    if broken:
        raise MergeError(gather(f"safe_merge refused adapters {list(names)}; nothing was changed:", broken))


def warn_of_loss(lost: Mapping[str, float]) -> None:
    """Warn when merging lost more than a twentieth of a change; ``lost``: by layer, see :class:`Merged`."""
    worst = max(lost, key=lambda name: lost[name], default=None)
    if worst is not None and lost[worst] > LOST_BOUND:
        warnings.warn(
            f"merging rounded {lost[worst]:.0%} of the adapter's change in {worst!r} away: it is too small for the "
            "dtype of the weights; merge into wider weights, or leave the adapter unmerged",
            MergePrecisionWarning,
            stacklevel=4,
        )
