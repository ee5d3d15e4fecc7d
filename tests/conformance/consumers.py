"""What may come behind an adapted layer: it writes into the layer's output, or makes a tensor of its own of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kilotune.layers.adapted import AdaptedLayer
from kilotune.layers.adapted_parameters import AdaptedParameters

__all__ = ["CONSUMERS", "behind", "results"]

Consumer = Callable[[Tensor], Any]


def _factors(y: Tensor) -> Tensor:
    return torch.linspace(-1.0, 2.0, y.shape[-1], dtype=y.dtype)


def _assign(y: Tensor) -> None:
    y[:1] = 0.5


def _assigned(y: Tensor) -> Tensor:
    return torch.cat([torch.full_like(y[:1], 0.5), y[1:]])


def _cut(y: Tensor) -> None:
    nn.ReLU(inplace=True)(y.sub_(y.detach().mean()))  # of an output that is negative everywhere nothing would be left


def _was_cut(y: Tensor) -> Tensor:
    return torch.relu(y - y.detach().mean())


CONSUMERS: dict[str, tuple[Consumer, Consumer]] = {  # (in place, as a function)
    "relu": (_cut, _was_cut),
    "mul": (lambda y: y.mul_(_factors(y)), lambda y: y * _factors(y)),
    "slice": (_assign, _assigned),
}


@contextmanager
def behind(model: nn.Module, consumer: Consumer, in_place: bool) -> Iterator[None]:
    """Inside, ``consumer`` gets the tensor that each adapted layer of ``model`` gives."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple)
        made = consumer(output[0] if several else output)
        if in_place:
            return None
        return (made, *output[1:]) if several else made

    with ExitStack() as held:
        for module in model.modules():
            if isinstance(module, (AdaptedLayer, AdaptedParameters)):
                held.enter_context(module.register_forward_hook(hook))
        yield


def results(model: nn.Module, run: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor | None]:
    """The output, and the gradients of what ``model`` trains and of ``leaves``."""
    y = run()
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)]
