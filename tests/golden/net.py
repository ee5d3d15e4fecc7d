"""The base models, inputs and adapter values of the golden files, by arithmetic alone: no random numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ramp(shape: tuple[int, ...], salt: int, size: float = 1.0) -> Tensor:
    """Multiples of ``size`` / 50 between -size and size in a fixed scattered order; exact up to the last product."""
    count = int(torch.Size(shape).numel())
    steps = (torch.arange(count, dtype=torch.int64) * 37 + salt * 17) % 101 - 50
    return steps.reshape(shape).to(torch.float32) * (size / 50)


class Net(nn.Module):
    """Three linear layers of different shapes, one without bias, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.second = nn.Linear(10, 8, bias=False)
        self.third = nn.Linear(8, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x)))
        return self.head(h + torch.tanh(self.third(torch.tanh(self.second(h)))))


def conv_net() -> nn.Module:
    """The same, its first and third layer transformers' Conv1D, which keeps its weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    net = Net()
    net.first, net.third = Conv1D(10, 6), Conv1D(10, 8)
    return net


NETS = {"linear": Net, "conv1d": conv_net}


def base(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A base model with its values filled in."""
    net = NETS[kind]()
    with torch.no_grad():
        for salt, (name, parameter) in enumerate(sorted(net.named_parameters())):
            offset = 1.0 if name == "norm.weight" else 0.0
            parameter.copy_(ramp(tuple(parameter.shape), salt, 0.5) + offset)
    return net.to(dtype).eval()


def fill(parameters: dict[str, Tensor]) -> None:
    """Values for an adapter's trained tensors, by the order of their names; what is there is added to."""
    with torch.no_grad():
        for salt, name in enumerate(sorted(parameters)):
            tensor = parameters[name]
            tensor.add_(ramp(tuple(tensor.shape), salt + 50, 0.4).to(tensor.dtype))


def inputs() -> Tensor:
    """(5, 6)."""
    return ramp((5, 6), 3, 2.0)
