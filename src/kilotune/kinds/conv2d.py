"""``torch.nn.Conv2d``."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor, nn

from ._conv import Convolution


@final
class Conv2d(Convolution):
    """A convolution over two dimensions."""

    name: ClassVar[str] = "conv2d"
    torch_class: ClassVar[type[nn.Module]] = nn.Conv2d
    dimensions: ClassVar[int] = 2

    def _convolve(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv2d)
        y: Tensor = module._conv_forward(x, weight, None)
        return y
