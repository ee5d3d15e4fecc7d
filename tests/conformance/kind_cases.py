"""Examples of the layer kinds, each with its mathematics written again in numpy. See ``KindCase``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kilotune.deltas import Need
from kilotune.kinds.experts import Experts
from tests.conformance.cases import INN, OUT, Array, KindCase, Layer
from tests.support import moe

__all__ = ["KIND_CASES"]


# -- linear ----------------------------------------------------------------------------------------


def _affine(x: Array, matrix: Array, bias: Array | None) -> Array:
    y: Array = np.einsum("...i,oi->...o", x, matrix)
    return y if bias is None else y + bias


def _conv1d_of_transformers(bias: bool) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(OUT, INN)
    nn.init.normal_(layer.bias)
    return layer


# -- convolutions ----------------------------------------------------------------------------------

_PADS: dict[str, Any] = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _convolved(
    x: Array,
    weight: Array,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    mode: str,
) -> Array:
    """A convolution (strictly: a correlation) of x (batch, in, space...), tap by tap."""
    kernel_positions, dims = weight.shape[2:], weight.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *padding], mode=_PADS[mode])
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], dilation, kernel_positions, stride)]
    y = np.zeros((len(x), len(weight), *sizes))
    out, inn = len(weight) // groups, x.shape[1] // groups
    for tap in itertools.product(*map(range, kernel_positions)):
        window = tuple(
            slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in zip(tap, dilation, stride, sizes, strict=True)
        )
        seen = x[(slice(None), slice(None), *window)]
        for g in range(groups):
            rows, channels = slice(g * out, (g + 1) * out), slice(g * inn, (g + 1) * inn)
            part = weight[(rows, slice(None), *tap)]  # (out, in) of the group
            y[:, rows] += np.moveaxis(np.tensordot(part, seen[:, channels], (1, 1)), 0, 1)
    assert y.ndim == dims + 2
    return y


def _convolution(
    cls: type[Any],
    name: str,
    inn: int,
    out: int,
    kernel: tuple[int, ...],
    space: tuple[int, ...],
    groups: int = 1,
    sides: Sequence[tuple[int, int]] | None = None,
    **options: Any,
) -> KindCase:
    """A case of a convolution; ``sides``: what is added to the axes where ``padding`` is a word."""
    dims, kernel_positions = len(kernel), int(np.prod(kernel))
    stride, dilation = options.get("stride", (1,) * dims), options.get("dilation", (1,) * dims)
    given = options.get("padding", (0,) * dims)
    padding = [(p, p) for p in given] if sides is None else list(sides)

    def run(x: Array, matrix: Array, bias: Array | None) -> Array:
        weight = matrix.reshape(out, inn // groups, *kernel)
        batch = x if x.ndim == dims + 2 else x[None]
        y = _convolved(batch, weight, stride, padding, dilation, groups, options.get("padding_mode", "zeros"))
        y = y if bias is None else y + bias.reshape(-1, *[1] * dims)
        return y if x.ndim == dims + 2 else y[0]

    return KindCase(
        lambda bias: cls(inn, out, kernel, groups=groups, bias=bias, **options),
        run,
        lambda w: w.reshape(out, -1),
        name,
        features=(out, inn // groups * kernel_positions),
        sample=(inn, *space),
        forms=4,
        kernel_positions=kernel_positions,
        deep=False,
        axes=(-1 - dims,),
    )


_CONV1D = [
    _convolution(nn.Conv1d, "", 3, 4, (3,), (7,), stride=(2,), padding=(1,)),
    _convolution(nn.Conv1d, "groups", 4, 6, (2,), (6,), groups=2, dilation=(2,)),
    _convolution(nn.Conv1d, "same", 2, 3, (4,), (5,), padding="same", padding_mode="circular", sides=[(1, 2)]),
]
_CONV2D = [
    _convolution(nn.Conv2d, "", 3, 4, (2, 3), (5, 4), stride=(1, 2), padding=(1, 0)),
    _convolution(nn.Conv2d, "groups", 4, 6, (3, 2), (4, 5), groups=2, padding=(1, 1), stride=(2, 1)),
    _convolution(nn.Conv2d, "depthwise", 4, 4, (3, 3), (4, 4), groups=4, padding=(1, 1)),
    _convolution(nn.Conv2d, "dilation", 2, 5, (2, 2), (5, 6), dilation=(2, 3)),
    _convolution(nn.Conv2d, "reflect", 3, 4, (3, 3), (4, 4), padding=(1, 2), padding_mode="reflect"),
    _convolution(
        nn.Conv2d, "same", 3, 4, (2, 3), (4, 4), padding="same", padding_mode="replicate", sides=[(0, 1), (1, 1)]
    ),
]
_CONV3D = [_convolution(nn.Conv3d, "", 2, 3, (2, 1, 2), (3, 2, 3), padding=(1, 0, 0), stride=(2, 1, 1))]


# -- embedding -------------------------------------------------------------------------------------

_IDS = 7


def _embedding(name: str = "", **options: Any) -> KindCase:
    return KindCase(
        lambda bias: nn.Embedding(_IDS, OUT, **options),
        lambda x, matrix, bias: np.moveaxis(matrix[:, x], 0, -1),
        lambda w: w.T,
        name,
        has_bias=False,
        features=(OUT, _IDS),
        ids=_IDS,
        fan_in=1,
    )


# -- norms, and whatever else has a bias -----------------------------------------------------------


def _filled(layer: nn.Module) -> nn.Module:
    """Not ones and zeros, as a norm begins."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def _layer_norm(x: Array, weight: Array, bias: Array | None) -> Array:
    axes = tuple(range(-weight.ndim, 0))
    centred = x - x.mean(axes, keepdims=True)
    y: Array = weight * centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)
    return y if bias is None else y + bias.reshape(weight.shape)


def _rms_norm(x: Array, weight: Array, bias: Array | None) -> Array:
    y: Array = weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return y if bias is None else y + bias


def _group_norm(x: Array, weight: Array, bias: Array | None) -> Array:
    """Two groups of two channels; x (batch, 4, space)."""
    parts = x.reshape(len(x), 2, -1)
    centred = parts - parts.mean(-1, keepdims=True)
    y = (centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)).reshape(x.shape)
    y = y * weight[:, None]
    return y if bias is None else y + bias[:, None]


class _Bent(nn.Module):
    """A layer that is nobody's: ``tanh(x) weight + bias``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(OUT)), nn.Parameter(torch.randn(OUT))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as torch's layers call it
        return torch.tanh(input) * self.weight + self.bias


_NORM = [
    KindCase(lambda bias: _filled(nn.LayerNorm(OUT, bias=bias)), _layer_norm, features=(OUT, OUT)),
    KindCase(
        lambda bias: _filled(nn.LayerNorm((2, 3))),
        _layer_norm,
        name="2-D",
        optional_bias=False,
        features=(6, 6),
        sample=(2, 3),
        axes=(-2, -1),
    ),
    KindCase(
        lambda bias: _filled(nn.RMSNorm(OUT, eps=1e-5)),
        _rms_norm,
        name="rms",
        has_bias=False,
        features=(OUT, OUT),
        keyword="x",
        bias_merges=False,
    ),
    KindCase(
        lambda bias: _filled(nn.GroupNorm(2, 4)),
        _group_norm,
        name="group",
        optional_bias=False,
        features=(4, 4),
        sample=(4, 3),
        deep=False,
        forms=3,
        axes=(1,),
    ),
]


# -- attention -------------------------------------------------------------------------------------

_WIDTH, _HEADS = 6, 2


class _SelfAttention(nn.Module):
    """Attention of a sequence to itself, x (batch, length, width)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        layer.requires_grad_(False)  # as in the adapted model: torch multiplies otherwise where a weight is trained

    def forward(self, x: Tensor) -> Tensor:
        sources = (x, x) if self.layer.kdim == _WIDTH else (x[..., :4], x)
        y: Tensor = self.layer(x, *sources, need_weights=False)[0]
        return y


def _attend(q: Array, k: Array, v: Array) -> Array:
    """Scaled dot products in _HEADS heads; (..., length, width)."""

    def split(a: Array) -> Array:
        return np.moveaxis(a.reshape(*a.shape[:-1], _HEADS, -1), -2, -3)

    q, k, v = split(q), split(k), split(v)
    scores = np.einsum("...qd,...kd->...qk", q, k) / np.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    y = np.einsum("...qk,...kd->...qd", scores / scores.sum(-1, keepdims=True), v)
    y = np.moveaxis(y, -3, -2)
    return y.reshape(*y.shape[:-2], -1)


def _numbers(module: nn.Module, name: str) -> Array | None:
    held = dict(module.named_parameters()).get(name)
    return None if held is None else held.detach().double().numpy()


def _attention(net: nn.Module, x: Array, layers: Mapping[str, Layer]) -> Array:
    """Query, key and value of one matrix, attention, the output's matrix."""
    matrix, bias = layers["layer"]
    out = layers.get("layer.out_proj", (_numbers(net, "layer.out_proj.weight"), _numbers(net, "layer.out_proj.bias")))
    assert out[0] is not None
    return _affine(_attend(*np.split(_affine(x, matrix, bias), 3, axis=-1)), out[0], out[1])


def _split_attention(net: nn.Module, x: Array, layers: Mapping[str, Layer]) -> Array:
    """Three matrices of their own sizes, the biases in one vector."""
    bias = layers["layer"][1]
    parts = np.split(bias, 3) if bias is not None else [None] * 3
    matrices = [_numbers(net, f"layer.{name}_proj_weight") for name in "qkv"]
    q, k, v = (_affine(s, m, b) for s, m, b in zip((x, x[..., :4], x), matrices, parts) if m is not None)
    out = layers.get("layer.out_proj", (_numbers(net, "layer.out_proj.weight"), _numbers(net, "layer.out_proj.bias")))
    assert out[0] is not None
    return _affine(_attend(q, k, v), out[0], out[1])


def _attention_case(**options: Any) -> Any:
    def make(bias: bool) -> nn.Module:
        layer = nn.MultiheadAttention(_WIDTH, _HEADS, bias=bias, batch_first=True, **options)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
        return layer

    return make


_ATTENTION: dict[str, Any] = {
    "features": (3 * _WIDTH, _WIDTH),
    "sample": (4, _WIDTH),
    "keyword": "",
    "forms": 4,
    "net": _SelfAttention,
    "scale": 0.3,
    "deep": False,
    "layers": ("layer", "layer.out_proj"),
}


# -- blocks ----------------------------------------------------------------------------------------


def _mlp(net: nn.Module, x: Array, layers: Mapping[str, Layer]) -> Array:
    h = np.tanh(_affine(x, _numbers(net, "layer.0.weight"), _numbers(net, "layer.0.bias")))  # type: ignore[arg-type]
    return _affine(h, _numbers(net, "layer.2.weight"), _numbers(net, "layer.2.bias"))  # type: ignore[arg-type]


# -- experts ---------------------------------------------------------------------------------------


class _Routed(nn.Module):
    """Experts with a routing that depends on the place of a token only; x (..., hidden)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(3)
        for parameter in layer.parameters():
            parameter.data.normal_(0.0, 0.4, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        index, weights = (torch.from_numpy(part).to(x.device) for part in _routing(len(tokens)))
        y: Tensor = self.layer(tokens, index, weights.to(x.dtype))
        return y.view(x.shape)


def _routing(tokens: int) -> tuple[np.ndarray[Any, Any], Array]:
    place = np.arange(tokens)[:, None]
    index = (place + np.array([0, 1])) % moe.EXPERTS  # (tokens, 2)
    return index, np.where(place % 2 == 0, [0.7, 0.3], [0.4, 0.6])


def _experts(layout: str, name: str = "") -> KindCase:
    form = moe.LAYOUTS[layout]

    def whole(net: nn.Module, x: Array, layers: Mapping[str, Layer]) -> Array:
        first, second = (layers[f"layer.{part}"] for part in (form.first, form.second))
        tokens = x.reshape(-1, x.shape[-1])
        return moe.dense(form, tokens, *_routing(len(tokens)), first, second).reshape(x.shape)

    def make(bias: bool) -> nn.Module:
        layer = form.make(8, 6)
        layer.config._experts_implementation = "eager"
        return layer

    return KindCase(
        make,
        canonical=(lambda w: w.transpose(0, 2, 1)) if form.inward else (lambda w: w),
        name=name,
        optional_bias=False,
        has_bias=form.bias,
        features=(12, 8),
        sample=(8,),
        keyword="",
        matrices=moe.EXPERTS,
        net=_Routed,
        targets={"target_modules": [], "target_parameters": [f"layer.{form.first}", f"layer.{form.second}"]},
        whole=whole,
        kind=Experts(form.first),
        layers=(f"layer.{form.first}", f"layer.{form.second}"),
        lacks=frozenset() if form.bias else frozenset({Need.BIAS}),
        scale=0.2,
    )


KIND_CASES: dict[str, list[KindCase]] = {
    "linear": [KindCase(lambda bias: nn.Linear(INN, OUT, bias=bias), _affine)],
    "conv1d-transformers": [
        KindCase(_conv1d_of_transformers, _affine, lambda w: w.T, optional_bias=False, keyword="x")
    ],
    "conv1d": _CONV1D,
    "conv2d": _CONV2D,
    "conv3d": _CONV3D,
    "embedding": [
        _embedding(),
        _embedding("padding", padding_idx=2),
        _embedding("by-frequency", scale_grad_by_freq=True),
        _embedding("sparse", sparse=True),
    ],
    "attention": [KindCase(_attention_case(), whole=_attention, **_ATTENTION)],
    "attention-split": [KindCase(_attention_case(kdim=4), whole=_split_attention, **_ATTENTION)],
    "experts": [_experts("mixtral"), _experts("gpt_oss", "transposed")],
    "norm": _NORM,
    "biased": [
        KindCase(lambda bias: _Bent(), lambda x, w, b: np.tanh(x) * w + b, optional_bias=False, features=(OUT, OUT))
    ],
    "block": [
        KindCase(
            lambda bias: nn.Sequential(nn.Linear(INN, 4), nn.Tanh(), nn.Linear(4, OUT)),
            whole=_mlp,
            has_bias=False,
        )
    ],
}
