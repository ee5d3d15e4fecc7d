"""Layer kinds. To add one: write one file with a :class:`LayerKind`, and list it here.

A kind says how a layer's weight is seen as the matrix (out, in). It knows nothing of methods and storages, and its file
imports `_base.py` and the floors below. Begin in linear.py.
"""

from __future__ import annotations

from torch import nn

from ._base import LayerKind, beside, hooked
from .attention import Attention, SplitAttention
from .biased import Biased
from .block import Block
from .conv1d import Conv1D
from .conv1d_torch import Conv1d
from .conv2d import Conv2d
from .conv3d import Conv3d
from .embedding import Embedding
from .linear import Linear
from .norm import Norm

__all__ = ["KINDS", "LayerKind", "beside", "hooked", "kind_of"]

# The first that matches is taken; Biased and Block match most, so they stand last.
KINDS: tuple[LayerKind, ...] = (
    Linear(),
    Conv1D(),
    Conv1d(),
    Conv2d(),
    Conv3d(),
    Embedding(),
    Attention(),
    SplitAttention(),
    Norm(),
    Biased(),
    Block(),
)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of ``module``, or None when there is none for it."""
    return next((kind for kind in KINDS if kind.matches(module)), None)
