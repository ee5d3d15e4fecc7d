"""Ways of keeping weights. To add one: write one file with a :class:`Storage`, and list it here.

A storage reads a frozen weight as floats and writes it back. It knows nothing of methods and kinds, and its file
imports `_base.py`, sharded.py and errors.py. Begin in dense.py.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ._base import Kept, Storage, put_parameter
from ._transformers import forget_quantisation, is_pretrained, unknown_scheme
from .bnb4 import BnB4bit
from .bnb8 import BnBInt8
from .dense import Dense
from .none import Held
from .torchao import TorchAO, TorchAODynamic

__all__ = [
    "STORAGES",
    "Kept",
    "Storage",
    "forget_quantisation",
    "is_pretrained",
    "prepare",
    "put_parameter",
    "release",
    "settle",
    "size_of",
    "storage_of",
    "unknown_scheme",
]

# torch's MultiheadAttention: with one weight or a bias, and with separate weights and none.
FUSED, SEPARATE = Dense("in_proj_weight", "in_proj_bias"), Dense("q_proj_weight", "in_proj_bias")

# The first that matches is taken. Dense last: a layer that bitsandbytes has yet to quantise holds plain floats.
STORAGES: tuple[Storage, ...] = (BnB4bit(), BnBInt8(), TorchAO(), TorchAODynamic(), Dense(), FUSED, SEPARATE, Held())


def storage_of(module: nn.Module) -> Storage | None:
    """The storage of ``module``'s weight, or None when there is none for it."""
    if isinstance(module, torch.jit.ScriptModule):  # its parts are not to be looked at
        return None
    return next((storage for storage in STORAGES if storage.matches(module)), None)


def prepare(modules: Iterable[nn.Module]) -> None:
    """Make the layers of a model, adapted or not, keep their bits and pass their gradients on."""
    for module in modules:
        if (storage := storage_of(module)) is not None:
            storage.prepare(module)


def release(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`prepare`."""
    for module in modules:
        if (storage := storage_of(module)) is not None:
            storage.release(module)


def settle(modules: Iterable[nn.Module]) -> None:
    """Make the layers of a model ready for others that have the very tensors of theirs."""
    for module in modules:
        if (storage := storage_of(module)) is not None:
            storage.settle(module)


def size_of(parameter: Tensor) -> tuple[int, int]:
    """How many numbers a parameter stands for, and in how many bytes it is held."""
    found = (storage.size(parameter) for storage in STORAGES)
    plain = (parameter.numel(), parameter.numel() * parameter.element_size())
    return next((size for size in found if size is not None), plain)
