"""``torch.nn.Conv1d``."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor, nn

from ._conv import Convolution


@final
class Conv1d(Convolution):
    """A convolution over one dimension."""

    name: ClassVar[str] = "conv1d"
    torch_class: ClassVar[type[nn.Module]] = nn.Conv1d
    dimensions: ClassVar[int] = 1

    def _convolve(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(module, nn.Conv1d)
        y: Tensor = module._conv_forward(x, weight, None)
        return y
