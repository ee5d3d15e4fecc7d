"""What a storage answers: how a frozen weight is read as floats, and written back. Knows nothing of
methods and layer kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

Kept = dict[str, nn.Parameter | None]


class Storage(ABC):
    """One way of keeping weights. Stateless: one instance serves all layers.

    ``lossless``: what is written can be read back. ``differentiable``: the forward passes the gradient
    on to its input.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    differentiable: ClassVar[bool]

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` keeps its weight this way; imports nothing."""

    @abstractmethod
    def read(self, module: nn.Module, kept: Kept | None = None) -> Tensor:
        """The weight as floats, in the layout of the layer kind; that of ``kept`` where it is given."""

    @abstractmethod
    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        """Give ``module`` another weight and bias, each where it is not None, as tensors of its own."""

    @abstractmethod
    def keep(self, module: nn.Module) -> Kept:
        """What :meth:`restore` needs to give back the very bits of now; copies nothing."""

    @abstractmethod
    def restore(self, module: nn.Module, kept: Kept) -> None:
        """Put back what :meth:`keep` gave."""

    @abstractmethod
    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype in which the layer computes."""

    @abstractmethod
    def device(self, module: nn.Module) -> torch.device:
        """The device on which the layer computes."""
