"""What PEFT keeps in ``peft.helpers``."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from ..adapter_files.files import locate, read_config
from ..adapter_files.names import CONFIG_NAME
from ..errors import CheckpointError, ConfigError, check_one_of
from ..injection.tree import layer_around, walk
from ..layers.adapted import AdaptedLayer
from .layer_shape import Scaling
from .tuners.inside import tuner_in

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder or a hub id holds an adapter: one with a configuration that says its method."""
    try:
        return "peft_type" in read_config(locate(model_name_or_path) / CONFIG_NAME)
    except CheckpointError:
        return False


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside this context the active low-rank adapters act ``multiplier`` times as strongly.

    Args:
        model: a PeftModel, or a base into which adapters were injected.
        multiplier: any finite number.

    Raises:
        ConfigError: no number. AdapterError: no adapters.

    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise ConfigError(f"multiplier: expected a number, got {multiplier!r}")
    layers = _layers(tuner_in(model).model)
    before = [
        (scaling, name, scaling[name])
        for layer in layers
        for scaling in [Scaling(layer)]
        for name in scaling
        if name in layer.state.active
    ]
    if not before:
        raise ConfigError("rescale_adapter_scale: no low-rank adapter is active in this model")
    try:
        for scaling, name, value in before:
            scaling[name] = value * multiplier
        yield
    finally:
        for scaling, name, value in before:
            scaling[name] = value


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """As in PEFT, where adapted layers do not cast their inputs inside; here they never do, so it changes nothing.

    An adapter's numbers are cast to the dtype in which its layer computes.

    Args:
        model: with adapters.
        active: as in PEFT.

    """
    yield


def _layers(root: nn.Module) -> list[AdaptedLayer]:
    return [layer for _, module, _ in walk(root) if (layer := layer_around(module)) is not None]


def update_forward_signature(model: Any) -> None:
    """Let ``model.forward`` have the signature and docstring of the base's, where its own says nothing."""
    _take(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Let ``model.generate`` have the signature and docstring of the base's, where its own says nothing."""
    _take(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Both, or one of them.

    Args:
        model: a PeftModel.
        method: "forward", "generate" or "all".

    """
    check_one_of("method", method, ["forward", "generate", "all"])
    for name in ("forward", "generate") if method == "all" else (method,):
        _take(model, name)


def _take(model: Any, name: str) -> None:
    own = getattr(type(model), name)
    names = set(inspect.signature(own).parameters) - {"self"}
    if names != {"args", "kwargs"}:
        return

    def runs(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    base = getattr(model.get_base_model(), name)
    update_wrapper(
        runs, getattr(type(model.get_base_model()), name), assigned=("__doc__", "__name__", "__annotations__")
    )
    own_place = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)  # which binding takes away again
    found = inspect.signature(base).parameters.values()
    runs.__signature__ = inspect.Signature([own_place, *found])  # type: ignore[attr-defined]
    model.__dict__[name] = MethodType(runs, model)
