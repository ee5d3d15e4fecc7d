"""What a storage answers: how a frozen weight is read as floats, and written back. Knows nothing of
methods and layer kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

Kept = dict[str, nn.Parameter | None]


class Storage(ABC):
    """One way of keeping weights. Stateless: one instance serves all layers.

    ``lossless``: what is written can be read back, up to the rounding of a float. ``differentiable``: the
    layer's own forward passes the gradient on to its input; where it does not, :meth:`prepare` makes it do so.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]
    differentiable: ClassVar[bool]
    # What a module calls its weight and its bias.
    weight_name: str = "weight"
    bias_name: str = "bias"

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` keeps its weight this way; imports nothing."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why a module that :meth:`matches` cannot be adapted as it is now; None where it can."""
        return None

    @abstractmethod
    def read(self, module: nn.Module, kept: Kept | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as floats, in the layout of the layer kind.

        Args:
            module: the layer.
            kept: read the weight that was kept here, not the one in the module.
            dtype: in which to give it, rounded once; by default that of :meth:`dtype`.

        """

    def read_bias(self, module: nn.Module, kept: Kept | None = None) -> Tensor | None:
        """The bias (out,), or that of ``kept`` where it is given; None where the layer has none."""
        held = module._parameters if kept is None else kept
        return held.get(self.bias_name)

    @abstractmethod
    def write(self, module: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
        """Give ``module`` another weight and bias, each where it is not None, as tensors of its own."""

    def rounded(self, module: nn.Module, weight: Tensor) -> Tensor:
        """What :meth:`read` gives after ``write(module, weight)``, in ``weight``'s dtype; changes nothing."""
        before = self.keep(module)
        try:
            self.write(module, weight, None)
            return self.read(module, None, weight.dtype)
        finally:
            self.restore(module, before)

    def dense(self, module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
        """A new layer of plain ``dtype`` parameters with this weight (out, in) and bias, in ``module``'s place."""
        return linear_of(module, weight, bias, dtype)

    @abstractmethod
    def keep(self, module: nn.Module) -> Kept:
        """What :meth:`restore` needs to give back the very bits of now; copies nothing."""

    @abstractmethod
    def restore(self, module: nn.Module, kept: Kept) -> None:
        """Put back what :meth:`keep` gave."""

    def move(self, kept: Kept, fn: Callable[[Tensor], Tensor]) -> None:
        """What ``nn.Module._apply(fn)`` does to parameters, for those that are ``kept`` outside of a module."""
        for name, parameter in kept.items():
            if parameter is not None:
                kept[name] = moved(parameter, fn(parameter.data))

    def prepare(self, module: nn.Module) -> None:
        """Called on every layer of a model, adapted or not, when adapters come into it.

        For what a vendor's layer does on its own that would lose bits of the base, or gradients.
        """
        return

    def release(self, module: nn.Module) -> None:
        """Undo :meth:`prepare`, when the model is given back without adapters."""
        return

    def settle(self, module: nn.Module) -> None:
        """Called before a second layer gets the very tensors of this one.

        For what a vendor's layer takes from its parameter at the first forward, so that the second would not find it.
        """
        return

    def size(self, parameter: Tensor) -> tuple[int, int] | None:
        """(numbers, bytes) of a parameter that packs several numbers into one; None for all others."""
        return None

    @abstractmethod
    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype in which the layer computes; where it :meth:`follows_input`, the best guess before any input."""

    def multiplies_read(self, module: nn.Module, differentiated: bool) -> bool:
        """Whether a product with what :meth:`read` gives may stand for a linear layer's forward, though that is the
        vendor's.

        Args:
            module: the layer.
            differentiated: whether the gradient of its input is wanted.

        """
        return False

    def follows_input(self, module: nn.Module) -> bool:
        """Whether the layer computes in the dtype of its input, whatever that is."""
        return False

    def scheme(self, module: nn.Module) -> str:
        """How the weight is kept, in words, for messages."""
        dtype = str(self.dtype(module)).removeprefix("torch.")
        return dtype if self.lossless else f"{self.name}, computing in {dtype}"

    @abstractmethod
    def device(self, module: nn.Module) -> torch.device:
        """The device on which the layer computes."""


def linear_of(module: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A plain ``nn.Linear`` in ``module``'s place: weight (out, in), bias (out,) or None, frozen, in ``dtype``."""
    out, inn = weight.shape
    layer = nn.Linear(inn, out, bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            fresh = value.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
            layer.register_parameter(name, nn.Parameter(fresh, requires_grad=False))
    return layer.train(module.training)


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Register ``parameter``, and put it into the module's own lists in which the one before it stands."""
    old = module._parameters.get(name)
    module.register_parameter(name, parameter)
    for key, held in module.__dict__.items() if old is not None else ():
        if isinstance(held, (list, tuple)) and any(item is old for item in held):
            new = [parameter if item is old else item for item in held]
            if isinstance(held, list):
                held[:] = new
            else:
                module.__dict__[key] = tuple(new)


def set_bias(module: nn.Module, bias: Tensor | None) -> None:
    """Put a bias (out,) of the dtype of the one that is there into ``module``; nothing for None.

    A layer that had none gets one in the dtype of ``bias``.
    """
    if bias is None:
        return
    like = module._parameters.get("bias")
    fresh = bias.detach().to(bias.dtype if like is None else like.dtype, copy=True)
    module.register_parameter("bias", nn.Parameter(fresh, requires_grad=False))


def moved(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    """``parameter`` with ``value`` in it, or a new one where it cannot hold that (on the meta device)."""
    if value.is_meta != parameter.is_meta:
        return nn.Parameter(value, requires_grad=False)
    parameter.data = value
    return parameter


def is_a(module: nn.Module, name: str, package: str) -> bool:
    """Whether ``module``'s class, or one it inherits from, is ``name`` of ``package``; imports nothing."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(module).__mro__)
