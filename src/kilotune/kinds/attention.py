"""``torch.nn.MultiheadAttention``: the matrix is the fused projection of query, key and value.

It multiplies by its weights itself, and never calls ``out_proj``, so the module runs with weights that are built for
the step, in each of its ways (the plain one and the fused kernel for inference).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ..deltas import Need
from ..errors import UnsupportedError
from ._base import LayerKind, NoMatrix, run_with

SEPARATE = (
    "its weights of query, key and value are separate (kdim or vdim is not embed_dim), so there is no in_proj_weight "
    "to adapt; 'out_proj' inside it can be adapted"
)


class _Torchs(LayerKind, ABC):
    """What both forms of the module have: out_proj goes with it, and it runs with weights built for the step."""

    substitutes: ClassVar[bool] = True
    with_it: ClassVar[tuple[str, ...]] = ("out_proj",)
    named_bias: ClassVar[bool] = False

    def features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.MultiheadAttention)
        return 3 * module.embed_dim, module.embed_dim

    def output_features(self, module: nn.Module) -> int:
        assert isinstance(module, nn.MultiheadAttention)
        width: int = module.embed_dim
        return width

    def bias_slot(self, module: nn.Module) -> bool:
        return _has_bias(module)

    def run_with(
        self, module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return _run_with(module, weights, args, kwargs)


@final
class Attention(_Torchs):
    """in_proj_weight (3 E, E) and in_proj_bias (3 E,): the rows are those of query, key and value, E each."""

    name: ClassVar[str] = "attention"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.LINEAR, Need.BIAS, Need.OUTPUT})
    all_linear: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return _is_attention(module) and module._parameters.get("in_proj_weight") is not None

    def canonical(self, module: nn.Module, weight: Tensor) -> Tensor:
        return weight

    def native(self, module: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def project(self, module: nn.Module, x: Tensor, matrix: Tensor) -> Tensor:
        raise UnsupportedError("attention has three inputs, so its input is not run through a factor of its matrix")

    def lift(self, module: nn.Module, h: Tensor, matrix: Tensor) -> Tensor:
        raise UnsupportedError("attention has three inputs, so its input is not run through a factor of its matrix")


@final
class SplitAttention(_Torchs, NoMatrix):
    """Attention whose keys or values have another size than the queries: in_proj_bias (3 E,) and the output only."""

    name: ClassVar[str] = "attention-split"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.BIAS, Need.OUTPUT})
    lacks: ClassVar[Mapping[Need, str]] = {Need.LINEAR: SEPARATE}

    def matches(self, module: nn.Module) -> bool:
        return _is_attention(module) and module._parameters.get("q_proj_weight") is not None


def _has_bias(module: nn.Module) -> bool:
    """Whether a merged bias of the projections leaves a module that torch can run: it wants two or none."""
    return module._parameters.get("in_proj_bias") is not None or getattr(module.out_proj, "bias", None) is not None


def _run_with(module: nn.Module, weights: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Torch's fused function takes no bias of the first projection without one of the second: zeros, then."""
    inner: Any = module.out_proj
    if (bias := weights.get("in_proj_bias")) is not None and getattr(inner, "bias", None) is None:
        place = "out_proj"
        while isinstance(inner, nn.Module) and "bias" not in inner._parameters:  # a wrapper
            inner, place = inner._modules["base_layer"], f"{place}.base_layer"
        weights = {**weights, f"{place}.bias": torch.zeros_like(bias[: bias.numel() // 3])}
    return run_with(module, weights, args, kwargs)


def _is_attention(module: nn.Module) -> bool:
    """Torch's, or a class made from it; not the one for quantisation, which has layers of its own instead."""
    return isinstance(module, nn.MultiheadAttention) and not type(module).__module__.startswith("torch.ao.")
