"""torchao's quantised tensors as the weight of ``nn.Linear``.

Tested with torchao 0.18.0 (the version 2 tensors). Its internals that are touched here: ``Int8Tensor``,
``Float8Tensor``, ``IntxUnpackedToInt8Tensor`` (attributes, constructors, ``from_hp``), ``Int4Tensor`` and
``Int4TilePackedTo4dTensor`` (``from_hp``), ``PerBlock``, ``MappingType``, ``dequantize_affine``, ``quantize_affine``.
The int4 tensors and dynamic float8 need a CUDA device, and what stands here for them was run on none.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._base import Kept, Storage, moved, set_bias

INT8, FLOAT8, INTX = "Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor"
INT4, INT4_TILED = "Int4Tensor", "Int4TilePackedTo4dTensor"


class _TorchAO(Storage):
    """What all of torchao's tensors have in common: they say themselves how they were quantised."""

    lossless: ClassVar[bool] = False

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` keeps its weight this way; imports nothing."""

    def refusal(self, module: nn.Module) -> str | None:
        if getattr(_tensor(module.get_parameter("weight")), "act_pre_scale", None) is not None:
            return "torchao scales this layer's input (AWQ, SmoothQuant), which an adapter does not know of"
        return None

    def read(self, module: nn.Module, kept: Kept | None = None, dtype: torch.dtype | None = None) -> Tensor:
        weight = (module._parameters if kept is None else kept)["weight"]
        assert weight is not None
        return _floats(_tensor(weight), weight.dtype if dtype is None else dtype)

    def rounded(self, module: nn.Module, weight: Tensor) -> Tensor:
        return _floats(self._encode(module, weight), weight.dtype)

    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        if weight is not None:
            fresh = nn.Parameter(self._encode(module, weight), requires_grad=False)
            module.register_parameter("weight", fresh)
        set_bias(module, bias)

    def keep(self, module: nn.Module) -> Kept:
        return dict(module._parameters)

    def restore(self, module: nn.Module, kept: Kept) -> None:
        for name, parameter in kept.items():
            module.register_parameter(name, parameter)

    def move(self, kept: Kept, fn: Callable[[Tensor], Tensor]) -> None:
        for name, parameter in kept.items():
            if parameter is None:
                continue
            if name == "weight":  # a tensor in several parts has no .data that could be exchanged
                kept[name] = nn.Parameter(fn(parameter.detach()), requires_grad=False)
            else:
                kept[name] = moved(parameter, fn(parameter.data))

    def size(self, parameter: Tensor) -> tuple[int, int] | None:
        tensor = _tensor(parameter)
        if type(tensor).__module__.partition(".")[0] != "torchao":
            return None
        optional = getattr(tensor, "optional_tensor_data_names", ())
        parts = (getattr(tensor, name, None) for name in (*tensor.tensor_data_names, *optional))
        return parameter.numel(), sum(p.numel() * p.element_size() for p in parts if isinstance(p, Tensor))

    def dtype(self, module: nn.Module) -> torch.dtype:
        return module.get_parameter("weight").dtype

    def multiplies_read(self, module: nn.Module, differentiated: bool) -> bool:
        # Where no gradient is wanted the vendor's kernels run. Where one is, autograd would keep the weight's floats.
        return differentiated and type(module) in (nn.Linear, PassingLinear)

    def device(self, module: nn.Module) -> torch.device:
        return module.get_parameter("weight").device

    def scheme(self, module: nn.Module) -> str:
        tensor = _tensor(module.get_parameter("weight"))
        kind = getattr(tensor, "target_dtype", None) or tensor.qdata.dtype
        blocks = " x ".join(map(str, tensor.block_size))
        return f"{type(tensor).__name__} of torchao, {str(kind).removeprefix('torch.')} in blocks of {blocks}"

    @staticmethod
    def _encode(module: nn.Module, weight: Tensor) -> Any:
        """Quantise floats (out, in) as the weight in ``module`` is; the quantisation starts from float32."""
        old = _tensor(module.get_parameter("weight"))
        return _ENCODE[type(old).__name__](old, weight.detach().to(torch.float32).contiguous())


@final
class PassingLinear(nn.Linear):
    """An ``nn.Linear`` whose weight quantises its input: as it is, but where the input's gradient is wanted.

    There it gives the exact product with the weight's floats, in training and in eval, without the rounding of
    the input.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, _floats(_tensor(self.weight), input.dtype), bias)


@final
class TorchAO(_TorchAO):
    """Weight-only quantisation: int8, int1 to int8 in groups, and float8.

    Of ``IntxWeightOnlyConfig`` a tensor does not keep whether the scales were chosen by 'hqq' or 'symmetric without
    clipping', so re-quantising chooses them by the plain symmetric rule there (or the asymmetric one, where the
    tensor has zero points).
    """

    name: ClassVar[str] = "torchao"
    differentiable: ClassVar[bool] = True

    def matches(self, module: nn.Module) -> bool:
        tensor = _held(module)
        return tensor is not None and type(tensor).__name__ in (INT8, FLOAT8, INTX) and not _quantises_input(tensor)


@final
class TorchAODynamic(_TorchAO):
    """What quantises the layer's input too (int8 and float8, dynamic or static), and packed int4.

    Their forward returns an output that claims to need a gradient, and passes none to the input (int8), or has no
    backward at all (int4): adapters below such a layer would stay as they are without a word. So :meth:`prepare`
    makes every such ``nn.Linear`` of the model, adapted or not, a :class:`PassingLinear`.
    """

    name: ClassVar[str] = "torchao-dynamic"
    differentiable: ClassVar[bool] = False

    def refusal(self, module: nn.Module) -> str | None:
        if type(module) not in (nn.Linear, PassingLinear):
            return f"its forward passes no gradient to its input, and {type(module).__name__} is not torch.nn.Linear"
        return super().refusal(module)

    def prepare(self, module: nn.Module) -> None:
        if type(module) is nn.Linear:
            module.__class__ = PassingLinear
        elif type(module) is not PassingLinear:
            warnings.warn(
                f"a {type(module).__name__} of this model holds a weight that quantises its input (torchao), and "
                "passes no gradient on: an adapter below it stays without gradients. Make it a torch.nn.Linear, which "
                "is mended here, or leave it out of the quantisation",
                UserWarning,
                stacklevel=7,
            )

    def release(self, module: nn.Module) -> None:
        if type(module) is PassingLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]

    def matches(self, module: nn.Module) -> bool:
        tensor = _held(module)
        if tensor is None:
            return False
        name = type(tensor).__name__
        return name in (INT4, INT4_TILED) or (name in (INT8, FLOAT8, INTX) and _quantises_input(tensor))


def _tensor(parameter: Tensor) -> Any:
    """The tensor of torchao's class behind a Parameter, which may be that class itself."""
    return parameter.data if type(parameter) is nn.Parameter else parameter


def _held(module: nn.Module) -> Any:
    """The torchao tensor that is the weight of an ``nn.Linear``, or None."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    if weight is None:
        return None
    tensor = _tensor(weight)
    return tensor if type(tensor).__module__.partition(".")[0] == "torchao" else None


def _quantises_input(tensor: Any) -> bool:
    given = (getattr(tensor, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
    return any(value is not None for value in given)


# -- floats ----------------------------------------------------------------------------------------


def _floats(tensor: Any, dtype: torch.dtype) -> Tensor:
    """A torchao tensor (out, in) as plain floats, rounded once, to ``dtype``."""
    floats: Tensor
    if type(tensor).__name__ == INTX:
        from torchao.quantization.quant_primitives import dequantize_affine

        # Its own dequantize() knows only the dtype it came from; float32 keeps every bit of code times scale.
        floats = dequantize_affine(
            tensor.qdata, tensor.block_size, tensor.scale, tensor.zero_point, torch.int8, output_dtype=torch.float32
        )
        return floats.to(dtype)
    if type(tensor).__name__ in (INT4, INT4_TILED):  # no dequantize(): the image of the unit vectors is the weight
        ones = torch.eye(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
        floats = F.linear(ones, tensor).T.contiguous()
        return floats.to(dtype)
    floats = tensor.dequantize(torch.float32)
    return floats.to(dtype)


# -- quantising as before --------------------------------------------------------------------------


def _mapping(old: Any) -> Any:
    """Whether the codes have zero points."""
    from torchao.quantization.quant_primitives import MappingType

    points = old.zero_point
    return MappingType.SYMMETRIC if points is None or not bool(points.any()) else MappingType.ASYMMETRIC


def _encode_int8(old: Any, weight: Tensor) -> Any:
    from torchao.quantization import PerBlock

    block = PerBlock(tuple(old.block_size))
    new = type(old).from_hp(weight, block, _mapping(old), reduce_range=bool(old.reduce_range))
    return type(old)(
        new.qdata,
        new.scale.to(old.scale.dtype),
        new.block_size,
        old.dtype,
        zero_point=None if old.zero_point is None else new.zero_point,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_quant_kwargs=old.act_quant_kwargs,
        reduce_range=old.reduce_range,
    )


def _encode_float8(old: Any, weight: Tensor) -> Any:
    from torchao.quantization import PerBlock

    new = type(old).from_hp(
        weight, old.qdata.dtype, PerBlock(tuple(old.block_size)), kernel_preference=old.kernel_preference
    )
    return type(old)(
        new.qdata,
        new.scale.to(old.scale.dtype).reshape(old.scale.shape),
        block_size=old.block_size,
        mm_config=old.mm_config,
        act_quant_kwargs=old.act_quant_kwargs,
        kernel_preference=old.kernel_preference,
        dtype=old.dtype,
    )


def _encode_intx(old: Any, weight: Tensor) -> Any:
    from torchao.quantization.quant_primitives import _DTYPE_TO_QVALUE_BOUNDS, quantize_affine

    new = type(old).from_hp(weight, old.block_size, old.target_dtype, mapping_type=_mapping(old))
    low, high = _DTYPE_TO_QVALUE_BOUNDS[old.target_dtype]
    scale = new.scale.to(old.scale.dtype)
    points = new.zero_point.to(old.zero_point.dtype)
    # The codes follow from the scales as they are kept, which may be 16-bit.
    codes = quantize_affine(weight, old.block_size, scale, points, torch.int8, quant_min=low, quant_max=high)
    return type(old)(codes, scale, points, old.target_dtype, old.block_size, old.dtype, old.activation_quantization)


def _encode_int4(old: Any, weight: Tensor) -> Any:
    return type(old).from_hp(weight.to(old.dtype), old.block_size, activation_dtype=old.activation_dtype)


def _encode_int4_tiled(old: Any, weight: Tensor) -> Any:
    return type(old).from_hp(weight.to(torch.bfloat16), old.block_size)


_ENCODE: dict[str, Callable[[Any, Tensor], Any]] = {
    INT8: _encode_int8,
    FLOAT8: _encode_float8,
    INTX: _encode_intx,
    INT4: _encode_int4,
    INT4_TILED: _encode_int4_tiled,
}
