"""Layer, group and root-mean-square norms: their bias can be trained, also where they have none; and their output."""

from __future__ import annotations

from typing import Any, ClassVar, final

from torch import Tensor, nn

from ..deltas import Need
from ._base import NoMatrix, run_with

_TORCH = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NAMES = ("RMSNorm", "LayerNorm")


@final
class Norm(NoMatrix):
    """torch's norms, and those that transformers calls ...RMSNorm or ...LayerNorm (never imported).

    With a bias the module itself runs with a changed one; without, the change is added to its output. torch's
    LayerNorm has a place for a bias even when it has none, so it gets one when it is merged; an RMSNorm has not.
    """

    name: ClassVar[str] = "norm"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.BIAS, Need.OUTPUT})

    def matches(self, module: nn.Module) -> bool:
        known = isinstance(module, _TORCH) or type(module).__name__.endswith(_NAMES)
        return known and any(isinstance(module._parameters.get(n), nn.Parameter) for n in ("weight", "bias"))

    def bias_slot(self, module: nn.Module) -> bool:
        return "bias" in module._parameters

    def native_bias(self, module: nn.Module, bias: Tensor) -> Tensor:
        return bias.view(_like(module).shape)

    def features(self, module: nn.Module) -> tuple[int, int]:
        return _like(module).numel(), 0

    def input_features(self, module: nn.Module) -> int:
        return self.features(module)[0]

    def features_last(self, module: nn.Module, y: Tensor) -> Tensor:
        return y.movedim(1, -1) if isinstance(module, nn.GroupNorm) else y.flatten(-_like(module).ndim)

    def features_back(self, module: nn.Module, y: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return y.movedim(-1, 1)
        return y.reshape(*y.shape[:-1], *_like(module).shape)

    def call(self, module: nn.Module, shift: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if shift is None:
            return module(*args, **kwargs)
        bias = module._parameters.get("bias")
        shift = shift.view(_like(module).shape)
        if bias is not None:
            return run_with(module, {"bias": (bias + shift).to(bias.dtype)}, args, kwargs)
        return super().call(module, shift, args, kwargs)


def _like(module: nn.Module) -> Tensor:
    """The weight, or the bias where there is no weight; both have the shape of what is normed."""
    weight = module._parameters.get("weight")
    return module.get_parameter("bias") if weight is None else weight
