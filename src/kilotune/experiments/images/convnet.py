"""The small convolutional network of the two tutorials, in both their variants.

Images (N, 3, 32, 32) go through conv 3-6 (5x5), pool, conv 6-16 (5x5), pool, and then through fully
connected layers. A third convolution, 16-32 (5x5), is built but never called: the tutorials' parameter
tables count it, so it is here, and it is called ``conv3_unused``.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

__all__ = ["LORA_WIDTHS", "VERA_WIDTHS", "ConvNet", "build"]

VERA_WIDTHS = (400, 120, 84, 84, 84, 10)
"""Widths of the fully connected part in the tutorial on VeRA: 89,118 parameters in all."""

LORA_WIDTHS = (400, 120, 84, 10)
"""Widths of the fully connected part in the tutorial on LoRA: 74,838 parameters in all."""


@final
class ConvNet(nn.Module):
    """Two convolutions with pooling, then a fully connected layer (``fc1``, ``fc2``, ...) per pair of widths.

    Args:
        widths: sizes of the fully connected part, the first 400 (16 maps of 5x5) and the last the classes.
    """

    def __init__(self, widths: tuple[int, ...] = VERA_WIDTHS) -> None:
        super().__init__()
        self.widths = widths
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3_unused = nn.Conv2d(16, 32, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.linear_names = tuple(f"fc{i}" for i in range(1, len(widths)))
        for name, inn, out in zip(self.linear_names, widths, widths[1:], strict=False):
            self.add_module(name, nn.Linear(inn, out))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, 32, 32), float32, about -1 to 1."""
        x = self.pool(torch.relu(self.conv1(images)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        for name in self.linear_names[:-1]:
            x = torch.relu(self.get_submodule(name)(x))
        logits: Tensor = self.get_submodule(self.linear_names[-1])(x)
        return logits


def build(widths: tuple[int, ...], seed: int) -> ConvNet:
    """A network as torch initialises it, drawn from ``seed``; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConvNet(widths)
