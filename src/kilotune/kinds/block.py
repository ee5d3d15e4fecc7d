"""A module that holds layers (a feed-forward, an attention, a whole block): something can be added to its output."""

from __future__ import annotations

import copy
from collections.abc import Iterator, MutableMapping
from typing import Any, ClassVar, final

from torch import Tensor, nn

from ..added_modules import base_modules, named_base_modules
from ..deltas import Need
from ..errors import UnsupportedError
from ._base import NoMatrix

LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@final
class Block(NoMatrix):
    """out: what the last linear layer inside gives; in: what the first one takes. The output is a tensor, or the first
    of several (a tuple, a list, transformers' ModelOutput).
    """

    name: ClassVar[str] = "block"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.OUTPUT})

    def matches(self, module: nn.Module) -> bool:
        return bool(module._modules) and not isinstance(module, LISTS)

    def refusal(self, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if next(_sizes(module), None) is None:
            return f"the sizes of its input and output cannot be told: no linear layer is inside this {kind}"
        for name, inner in named_base_modules(module):
            if _holds_experts(inner):
                return (
                    f"the size of its output cannot be told: the last product in this {kind} may be one of the "
                    f"experts ({name or kind!r}); name a layer inside"
                )
        return None

    def features(self, module: nn.Module) -> tuple[int, int]:
        sizes = list(_sizes(module))
        if not sizes:
            raise UnsupportedError(str(self.refusal(module)))
        return sizes[-1][0], sizes[0][1]

    def tensor_of(self, output: Any) -> Tensor:
        first = output
        if isinstance(output, MutableMapping) and output:
            first = output[next(iter(output))]
        elif isinstance(output, (tuple, list)) and output:
            first = output[0]
        if not isinstance(first, Tensor):
            raise UnsupportedError(
                f"a block with an adapter on its output gave a {type(output).__name__} that does not begin with a "
                "tensor; name a layer inside the block instead"
            )
        return first

    def with_tensor(self, output: Any, tensor: Tensor) -> Any:
        if isinstance(output, MutableMapping):
            changed = copy.copy(output)
            changed[next(iter(output))] = tensor
            return changed
        if isinstance(output, tuple) and hasattr(output, "_make"):
            return type(output)(tensor, *output[1:])  # a named tuple
        return super().with_tensor(output, tensor)


def _holds_experts(module: nn.Module) -> bool:
    stacked = any(p is not None and p.ndim == 3 and p.shape[0] > 1 for p in module._parameters.values())
    return stacked and not isinstance(module, nn.modules.conv._ConvNd)


def _sizes(module: nn.Module) -> Iterator[tuple[int, int]]:
    """(out, in) of the linear layers inside, in the order in which they were made."""
    return (size for inner in base_modules(module) if (size := _size(inner)) is not None)


def _size(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of torch, of a vendor's that says its sizes alike, or of transformers' Conv1D."""
    for out, inn in (("out_features", "in_features"), ("nf", "nx")):
        found = module.__dict__.get(out), module.__dict__.get(inn)
        if isinstance(found[0], int) and isinstance(found[1], int):
            return found[0], found[1]
    return None
