"""Any other module with a parameter named ``bias`` (a batch norm, a bilinear layer): its bias can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

from torch import Tensor, nn

from ..deltas import Need
from ._base import NoMatrix, run_with

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@final
class Biased(NoMatrix):
    """Runs the module itself with a changed bias, so it is right whatever the module does with it."""

    name: ClassVar[str] = "biased"
    offers: ClassVar[frozenset[Need]] = frozenset({Need.BIAS})
    lacks: ClassVar[Mapping[Need, str]] = {
        Need.OUTPUT: "which axes of its output are features is known to its own code only"
    }

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module._parameters.get("bias"), nn.Parameter)

    def features(self, module: nn.Module) -> tuple[int, int]:
        return module.get_parameter("bias").numel(), 0

    def lack(self, module: nn.Module, need: Need) -> str | None:
        if need is Need.LINEAR and isinstance(module, _TRANSPOSED):
            return "in a transposed convolution an input meets the columns of several outputs, not the rows of one"
        return None

    def native_bias(self, module: nn.Module, bias: Tensor) -> Tensor:
        return bias.view(module.get_parameter("bias").shape)

    def call(self, module: nn.Module, shift: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if shift is None:
            return module(*args, **kwargs)
        bias = module.get_parameter("bias")
        return run_with(module, {"bias": (bias + shift.view(bias.shape)).to(bias.dtype)}, args, kwargs)
