"""What PEFT keeps in ``peft.utils.integrations``: modules that are made without numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ["init_empty_weights", "skip_init_on_device"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_EMPTY: ContextVar[bool] = ContextVar("kilotune_empty_weights", default=False)


def _on_meta(module: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
    """What a module keeps in the place of a tensor that it is given; None: that tensor."""
    if value is None or not _EMPTY.get():
        return None
    moved = value.to("meta")
    return nn.Parameter(moved, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else moved


@contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Modules that are made inside this context, in this thread, have parameters on the meta device: no memory.

    Args:
        include_buffers: buffers too.

    """
    hook: Callable[..., Any] = _on_meta  # torch's types say that it returns nothing
    hooks = [register_module_parameter_registration_hook(hook)]
    hooks += [register_module_buffer_registration_hook(hook)] if include_buffers else []
    token = _EMPTY.set(True)
    try:
        yield
    finally:
        _EMPTY.reset(token)
        for handle in hooks:
            handle.remove()


def skip_init_on_device(func: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A function in which :func:`init_empty_weights` around it has no effect."""

    @functools.wraps(func)
    def runs(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        token = _EMPTY.set(False)
        try:
            return func(*args, **kwargs)
        finally:
            _EMPTY.reset(token)

    return runs
