"""A second tree of modules over the same weights: one answers, the other learns.

::

    twin = twin_of(base)                      before anything is wrapped
    registry = AdapterRegistry(store, base)   the engine changes the base's attention and wraps its layers
    stepper = Stepper(twin)                   training wraps the twin's; config and modes are its own too

No number is there twice: parameters, buffers, and what a quantised weight is read with.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .. import storage
from ..errors import UnsupportedError
from ..injection.tree import WRAPPERS, held_tensors, own_modules

__all__ = ["twin_of"]

ATTENTION = "sdpa"  # which needs no cache, and gives gradients


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of a model's modules and config that holds the model's own tensors.

    Args:
        model: of transformers or torch; no layer of it is adapted.

    Raises:
        UnsupportedError: it is adapted, or has something that cannot be copied (a lock, an open file).

    """
    if any(isinstance(module, WRAPPERS) for module in model.modules()):
        raise UnsupportedError("twin_of: the model's layers are adapted already; make its twin before that")
    storage.prepare(own_modules(model))  # quantised layers change what they hold when they run; not these
    storage.settle(own_modules(model))
    shared: dict[int, Any] = {id(tensor): tensor for tensor in held_tensors(model)}
    try:
        made = copy.deepcopy(model, shared)
    except TypeError as error:  # locks, files and the like
        raise UnsupportedError(f"twin_of: the {type(model).__name__} holds what cannot be copied: {error}") from error
    choose: Any = getattr(made, "set_attn_implementation", None)  # of transformers' models
    if choose is not None and getattr(made, "_supports_sdpa", False):
        choose(ATTENTION)
    return made
