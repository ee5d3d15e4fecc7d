"""PEFT's classes of LoRA layers, to ask what a module is: ``isinstance(module, LoraLayer)``. None is made of them."""

from __future__ import annotations

from typing import ClassVar, final

from ..tuners_utils import BaseTunerLayer

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "ParamWrapper"]


class LoraLayer(BaseTunerLayer):
    """A layer with a LoRA adapter."""

    method: ClassVar[str] = "lora"


@final
class Linear(LoraLayer):
    """A linear layer with a LoRA adapter."""

    bases: ClassVar[tuple[str, ...]] = ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")


@final
class Embedding(LoraLayer):
    """An embedding with a LoRA adapter."""

    bases: ClassVar[tuple[str, ...]] = ("Embedding",)


@final
class Conv1d(LoraLayer):
    """A convolution of one dimension with a LoRA adapter."""

    bases: ClassVar[tuple[str, ...]] = ("Conv1d",)


@final
class Conv2d(LoraLayer):
    """A convolution of two dimensions with a LoRA adapter."""

    bases: ClassVar[tuple[str, ...]] = ("Conv2d",)


@final
class Conv3d(LoraLayer):
    """A convolution of three dimensions with a LoRA adapter."""

    bases: ClassVar[tuple[str, ...]] = ("Conv3d",)


@final
class ParamWrapper(LoraLayer):
    """A parameter with a LoRA adapter, such as all matrices of a block's experts; ``parameter_name`` says which."""

    of_parameters: ClassVar[bool] = True
