"""Tiny modules that multiply by the weights of layers themselves, each as a known library does. Written here anew."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kilotune import PeftModel

WIDTH, HEADS = 8, 2


def seeded(module: nn.Module) -> nn.Module:
    """The module with normal weights of one seed, in float64, frozen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(std=0.4, generator=generator)
    return module.requires_grad_(False)


@torch.no_grad()
def change(model: PeftModel, plain: nn.Module) -> nn.Module:
    """``plain`` with W + (alpha / r) B A by the formula, whatever the layer's layout is."""
    for name, slot in model.installed("default").slots().items():
        layer = plain.get_submodule(name)
        weight = layer.get_parameter("weight")
        delta = 2.0 * slot.get_parameter("lora_B") @ slot.get_parameter("lora_A")
        weight += (delta.T if isinstance(layer, nn.Embedding) else delta).reshape(weight.shape)
    return plain


class JoinedBias(nn.Module):
    """As timm's eva02: one projection whose bias is put together of those of query and value."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, dim=-1)
        attended: Tensor = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(attended)
        return projected


def windowed(x: Tensor, qkv: Tensor, proj: Tensor, qkv_bias: Tensor | None, proj_bias: Tensor | None) -> Tensor:
    """Attention as a function, as torchvision's Swin has it; its second version zeroes the bias of the keys."""
    if qkv_bias is not None:
        qkv_bias = qkv_bias.clone()
        width = qkv_bias.numel() // 3
        qkv_bias[width : 2 * width].zero_()
    q, k, v = F.linear(x, qkv, qkv_bias).chunk(3, dim=-1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return F.linear((q @ k.transpose(-2, -1)).softmax(-1) @ v, proj, proj_bias)


class Windowed(nn.Module):
    """As torchvision's SwinTransformer (both versions): the weights are arguments of a function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return windowed(x, self.qkv.weight, self.proj.weight, self.qkv.bias, self.proj.bias)


class AttentionPool(nn.Module):
    """As open_clip's ResNet: torch's attention function with the weights of four linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        pooled, _ = F.multi_head_attention_forward(
            x[:1], x, x, WIDTH, HEADS, None, biases, None, None, False, 0.0, self.c_proj.weight, self.c_proj.bias,
            training=self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return pooled[0]


class Resized(nn.Module):
    """As Siglip2's positions: a table that is made larger, and never looked up in."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(9, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        table = self.positions.weight.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(table, size=(x.shape[1], 1), mode="bilinear", align_corners=False)
        return torch.tanh(x + resized.flatten(2).transpose(1, 2))


class StepOfConvolution(nn.Module):
    """As RecurrentGemma's and Mamba's steps: the kernel of a convolution without the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sum(x[:, :3].transpose(1, 2) * self.conv.weight[:, 0, :], dim=-1) + self.conv.bias


class RunAndRead(nn.Module):
    """A table that is looked up in, and multiplied by at the end, as tied heads without a module are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.sum(-1) * 10).long() % 7
        return (self.table(ids) + x).tanh() @ self.table.weight.T


class Multiplied(torch.autograd.Function):
    """x W^T with a backward of its own, as fused kernels are written; it gets its arguments as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class OwnBackward(nn.Module):
    """A head whose weight goes to a function with its own backward, as fused losses take it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = Multiplied.apply(x, self.head.weight)  # type: ignore[no-untyped-call]
        return made + self.head.bias


class Checkpointed(nn.Module):
    """A part that is computed again in the backward, with the weight as an argument or read inside."""

    def __init__(self, use_reentrant: bool, as_argument: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.use_reentrant, self.as_argument = use_reentrant, as_argument

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if not torch.is_grad_enabled():
            y = F.linear(x, self.second.weight)
        elif self.as_argument:
            y = checkpoint(F.linear, x, self.second.weight, use_reentrant=self.use_reentrant)
        else:
            y = checkpoint(lambda z: F.linear(z, self.second.weight), x, use_reentrant=self.use_reentrant)
        return torch.tanh(y)


class ByItself(nn.Module):
    """A model of which a method is called that is not ``forward``, and no module inside it is."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward_features(self, x: Tensor) -> Tensor:
        return x @ self.proj.weight.mT

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).tanh()


# name -> (module, targets)
READERS: dict[str, tuple[Any, list[str]]] = {
    "eva02": (JoinedBias, ["qkv", "proj"]),
    "swin": (Windowed, ["qkv", "proj"]),
    "attention pool": (AttentionPool, ["q_proj", "v_proj", "c_proj"]),
    "siglip2 positions": (Resized, ["positions"]),
    "step of a convolution": (StepOfConvolution, ["conv"]),
    "run and read": (RunAndRead, ["table"]),
    "own backward": (OwnBackward, ["head"]),
    "checkpoint, argument, reentrant": (lambda: Checkpointed(True, True), ["first", "second"]),
    "checkpoint, argument": (lambda: Checkpointed(False, True), ["first", "second"]),
    "checkpoint, read inside, reentrant": (lambda: Checkpointed(True, False), ["first", "second"]),
    "checkpoint, read inside": (lambda: Checkpointed(False, False), ["first", "second"]),
    "forward_features": (ByItself, ["proj"]),
}
