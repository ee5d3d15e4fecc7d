"""``torch.nn.Conv3d``."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor, nn

from ._conv import Convolution


@final
class Conv3d(Convolution):
    """A convolution over three dimensions."""

    name: ClassVar[str] = "conv3d"
    torch_class: ClassVar[type[nn.Module]] = nn.Conv3d
    dimensions: ClassVar[int] = 3

    def _convolve(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv3d)
        y: Tensor = module._conv_forward(x, weight, None)
        return y
