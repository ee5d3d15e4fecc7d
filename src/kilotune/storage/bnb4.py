"""bitsandbytes' 4-bit layers: NF4 and FP4, with and without double quantisation.

Tested with bitsandbytes 0.50.2. Its internals that are touched here: ``Linear4bit`` (``weight``, ``quant_state``,
``compute_dtype``, ``support_avx512bf16_for_cpu``), ``Params4bit``, ``QuantState``, ``functional.quantize_4bit``,
``functional.dequantize_4bit`` and ``functional._convert_weight_packed_for_cpu_inverse``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from ._base import Kept, Storage, is_a, set_bias

AVX512 = "support_avx512bf16_for_cpu"
PACKED = "packing_format_for_cpu"


@final
class BnB4bit(Storage):
    """``bitsandbytes.nn.Linear4bit`` and what inherits from it.

    The layer keeps two 4-bit codes to a byte, and a scale for each block of (usually) 64 of them. The weight that
    is read is exactly the one that the layer's forward multiplies by, with one exception that :meth:`prepare` turns
    off: on a CPU with AVX512-BF16 the layer, run in eval without gradients, packs its weight anew with scales
    rounded to bfloat16. That changes the base for good, refuses sizes that are not multiples of 32, cuts the
    gradient of every later step, and is not undone rightly when the model is saved.
    """

    name: ClassVar[str] = "bnb-4bit"
    lossless: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        return is_a(module, "Linear4bit", "bitsandbytes")

    def refusal(self, module: nn.Module) -> str | None:
        if _state(module.get_parameter("weight")) is None:
            return "its weight is not quantised yet; bitsandbytes does that when the model is moved: model.to(device)"
        return None

    def read(self, module: nn.Module, kept: Kept | None = None, dtype: torch.dtype | None = None) -> Tensor:
        weight = (module._parameters if kept is None else kept)["weight"]
        assert weight is not None
        return _floats(weight.data, _state(weight), self.dtype(module) if dtype is None else dtype)

    def rounded(self, module: nn.Module, weight: Tensor) -> Tensor:
        return _floats(*self._encode(module, weight), weight.dtype)

    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        if weight is not None:
            old: Any = module.get_parameter("weight")
            codes, state = self._encode(module, weight)
            fresh = type(old)(
                codes,
                requires_grad=False,
                quant_state=state,
                blocksize=state.blocksize,
                compress_statistics=state.nested,
                quant_type=state.quant_type,
                quant_storage=codes.dtype,
                module=module,
                bnb_quantized=True,
            )
            self._put(module, fresh)
        set_bias(module, bias)

    def keep(self, module: nn.Module) -> Kept:
        return dict(module._parameters)

    def restore(self, module: nn.Module, kept: Kept) -> None:
        for name, parameter in kept.items():
            if name == "weight" and parameter is not None:
                self._put(module, parameter)
            else:
                module.register_parameter(name, parameter)

    def move(self, kept: Kept, fn: Callable[[Tensor], Tensor]) -> None:
        for name, parameter in kept.items():
            if parameter is None:
                continue
            if name != "weight":
                parameter.data = fn(parameter.data)
                continue
            # The codes may stand in a float dtype (quant_storage), so they follow to a device, never to a dtype.
            device = fn(torch.empty(0, device=parameter.device)).device
            parameter.data = parameter.data.to(device)
            state = _state(parameter)
            if device.type != "meta":
                state.to(device)

    def prepare(self, module: nn.Module) -> None:
        weight: Any = module.get_parameter("weight")
        if getattr(_state(weight), PACKED, False):
            _unpack(weight)
            module.quant_state = weight.quant_state
        setattr(module, AVX512, False)  # and it stays so: a merged model is evaluated and saved, too

    def size(self, parameter: Tensor) -> tuple[int, int] | None:
        if type(parameter).__name__ != "Params4bit" or (state := _state(parameter)) is None:
            return None
        held = [parameter.data, state.absmax, *([state.state2.absmax] if state.nested else [])]
        return prod(state.shape), sum(t.numel() * t.element_size() for t in held)

    def dtype(self, module: nn.Module) -> torch.dtype:
        given = getattr(module, "compute_dtype", None)
        if given is None:  # bitsandbytes takes the first input's, which is most likely the one the weight had
            given = _state(module.get_parameter("weight")).dtype
        assert isinstance(given, torch.dtype)
        return given

    def multiplies_read(self, module: nn.Module, differentiated: bool) -> bool:
        return True

    def follows_input(self, module: nn.Module) -> bool:
        return getattr(module, "compute_dtype", None) is None

    def device(self, module: nn.Module) -> torch.device:
        return module.get_parameter("weight").device

    def scheme(self, module: nn.Module) -> str:
        state = _state(module.get_parameter("weight"))
        double = ", double quantisation" if state.nested else ""
        return f"bitsandbytes 4-bit {state.quant_type}, blocks of {state.blocksize}{double}"

    def _encode(self, module: nn.Module, weight: Tensor) -> tuple[Tensor, Any]:
        """Quantise (out, in) floats as the weight in ``module`` is: codes and their state."""
        from bitsandbytes.functional import quantize_4bit

        old: Any = module.get_parameter("weight")
        codes, state = quantize_4bit(
            weight.detach().to(torch.float32).contiguous(),
            blocksize=old.quant_state.blocksize,
            compress_statistics=old.quant_state.nested,
            quant_type=old.quant_state.quant_type,
            quant_storage=old.data.dtype,
        )
        state.dtype = old.quant_state.dtype
        return codes, state

    @staticmethod
    def _put(module: nn.Module, weight: nn.Parameter) -> None:
        module.register_parameter("weight", weight)
        module.quant_state = _state(weight)


def _state(weight: Tensor) -> Any:
    """The ``QuantState`` of a ``Params4bit``; None before it is quantised."""
    return getattr(weight, "quant_state", None)


def _unpack(weight: Any) -> None:
    """Undo the packing of bitsandbytes' CPU kernel; the scales stay rounded to bfloat16, as it left them."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = weight.quant_state.absmax  # (in / block, out)
    weight.data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not state.nested:  # 0.50.2 forgets to turn these back, which scrambles all weights but those one block wide
        state.absmax = scales.T.to(torch.float32).reshape(-1).contiguous()
    weight.quant_state = state


def _floats(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """(out, in) floats; the products of code and scale are rounded once, to ``dtype``."""
    from bitsandbytes.functional import dequantize_4bit

    narrow = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
    asked = type(state)(
        absmax=state.absmax,
        shape=state.shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=narrow,
        offset=state.offset,
        state2=state.state2,
    )
    floats: Tensor = dequantize_4bit(codes, asked)
    return floats.to(dtype)
