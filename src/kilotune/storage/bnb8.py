"""bitsandbytes' int8 layers (LLM.int8(), arXiv 2208.07339).

Tested with bitsandbytes 0.50.2. Its internals that are touched here: ``Linear8bitLt`` (``weight``, ``state``) and
``Int8Params`` (``CB``, ``SCB``), whose codes and scales wander from the parameter to the layer's state at the
first forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ._base import Kept, Storage, is_a, set_bias

SCALES = "SCB"


@final
class BnBInt8(Storage):
    """``bitsandbytes.nn.Linear8bitLt``: int8 codes (out, in) and one float32 scale for each row.

    Row o of the weight is ``codes[o] * scales[o] / 127``. In eval, and on CUDA in training too, the layer rounds its
    *input* to int8 as well, which a weight cannot show: expect the layer's output to differ from the product with
    the weight that is read by about half a percent. The gradient at the input passes through that weight.
    """

    name: ClassVar[str] = "bnb-int8"
    lossless: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "Linear8bitLt", "bitsandbytes")

    def refusal(self, module: nn.Module) -> str | None:
        if module.state.has_fp16_weights:  # type: ignore[union-attr]
            return "it quantises a trained 16-bit weight anew in each step; make it with has_fp16_weights=False"
        if module.get_parameter("weight").dtype != torch.int8 or _scales(module) is None:
            return "its weight is not quantised yet; bitsandbytes does that when the model is moved: model.to(device)"
        return None

    def read(self, module: nn.Module, kept: Kept | None = None, dtype: torch.dtype | None = None) -> Tensor:
        weight = (module._parameters if kept is None else kept)["weight"]
        scales = _scales(module) if kept is None else kept[SCALES]
        assert weight is not None
        assert scales is not None
        return _floats(weight.data, scales, self.dtype(module) if dtype is None else dtype)

    def rounded(self, module: nn.Module, weight: Tensor) -> Tensor:
        return _floats(*_encode(weight), weight.dtype)

    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        if weight is not None:
            codes, scales = _encode(weight)
            old: Any = module.get_parameter("weight")
            fresh: nn.Parameter = type(old)(codes, requires_grad=False, has_fp16_weights=False)
            _put(module, fresh, scales)
        set_bias(module, bias)

    def keep(self, module: nn.Module) -> Kept:
        scales = _scales(module)
        assert scales is not None
        # A view as a Parameter, because Kept holds such: it copies nothing.
        return {**module._parameters, SCALES: nn.Parameter(scales.detach(), requires_grad=False)}

    def restore(self, module: nn.Module, kept: Kept) -> None:
        for name, parameter in kept.items():
            if name == "weight" and parameter is not None:
                scales = kept[SCALES]
                assert scales is not None
                _put(module, parameter, scales.data)
            elif name != SCALES:
                module.register_parameter(name, parameter)

    def move(self, kept: Kept, fn: Callable[[Tensor], Tensor]) -> None:
        for name, parameter in kept.items():
            if parameter is not None:  # the scales stay float32, whatever dtype the model goes to
                moved = fn(parameter.data)
                parameter.data = parameter.data.to(moved.device) if name == SCALES else moved

    def settle(self, module: nn.Module) -> None:
        if getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()  # type: ignore[operator]

    def dtype(self, module: nn.Module) -> torch.dtype:
        bias = module._parameters.get("bias")
        return torch.float32 if bias is None else bias.dtype  # a guess; the layer runs in its input's

    def follows_input(self, module: nn.Module) -> bool:
        return True

    def device(self, module: nn.Module) -> torch.device:
        return module.get_parameter("weight").device

    def scheme(self, module: nn.Module) -> str:
        return "bitsandbytes int8, a scale for each row"


def _scales(module: nn.Module) -> Tensor | None:
    """The scales (out,) of each row, wherever bitsandbytes has them now."""
    weight: Any = module.get_parameter("weight")
    held: Any = weight.SCB if getattr(weight, SCALES, None) is not None else module.state.SCB  # type: ignore[union-attr]
    return held if isinstance(held, Tensor) else None


def _put(module: nn.Module, weight: nn.Parameter, scales: Tensor) -> None:
    """Put codes and scales where a layer that has not run yet has them; its next forward takes them from there."""
    fresh: Any = weight
    fresh.CB, fresh.SCB = weight.data, scales
    state: Any = copy.copy(module.state)  # a backward that is still to come reads its codes from the old one
    state.CB = state.SCB = None
    module.state = state
    module.register_parameter("weight", weight)


def _encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Floats (out, in) -> int8 codes (out, in) and float32 scales (out,), without the rounding to float16 before."""
    wide = weight.detach().to(torch.float32)
    scales = wide.abs().amax(dim=1)  # (out,)
    factor = torch.where(scales > 0, 127.0 / scales, torch.zeros_like(scales))
    return torch.round(wide * factor.unsqueeze(1)).to(torch.int8).contiguous(), scales


def _floats(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.to(torch.float32) * (scales.unsqueeze(1) / 127.0)).to(dtype)
