"""Layer kinds. To add one: write one file with a :class:`LayerKind`, and list it here."""

from __future__ import annotations

from torch import nn

from ._base import LayerKind
from .biased import Biased
from .conv1d import Conv1D
from .linear import Linear

__all__ = ["KINDS", "LayerKind", "kind_of"]

# The first that matches is taken; Biased offers least and matches most, so it stands last.
KINDS: tuple[LayerKind, ...] = (Linear(), Conv1D(), Biased())


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of ``module``, or None when there is none for it."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
