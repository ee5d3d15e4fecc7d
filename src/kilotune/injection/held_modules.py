"""Modules that a module holds in plain attributes, lists, tuples, dicts and sets, beside where they are registered.

A wrapper goes there too: else the module would run without its adapters where it is taken from such a list, until they
are merged. Where it cannot go, in a bound method, the adapter is refused.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any

from torch import nn

from ..errors import UnsupportedError, gather

__all__ = ["check_calls", "put_into_containers"]

_TORCHS = frozenset(vars(nn.Module()))  # parameters, children, hooks
_CALLS = ("forward", nn.Module.__call__.__name__, "_call_impl")


def put_into_containers(holder: nn.Module, new: Callable[[nn.Module], nn.Module]) -> None:
    """Replace modules in ``holder``'s attributes, and the containers there, by what ``new`` gives for them.

    Not a module that ``holder`` lies in: that is how a part knows the whole, and no way in which the whole is run.
    """
    seen: set[int] = set()
    for name, value in _own(holder):
        changed = _changed(value, lambda module: module if _inside(holder, module) else new(module), seen)
        if changed is not value:
            vars(holder)[name] = changed


def _own(holder: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(holder).items() if name not in _TORCHS]


def _inside(holder: nn.Module, module: nn.Module) -> bool:
    return any(inner is holder for inner in module.modules())


def _changed(value: Any, new: Callable[[nn.Module], nn.Module], seen: set[int]) -> Any:
    """``value`` with other modules in it: the same object where it can be changed, or needs no change."""
    if isinstance(value, nn.Module):
        return new(value)
    if isinstance(value, (tuple, frozenset)):
        items = [_changed(item, new, seen) for item in value]
        if all(one is two for one, two in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, (list, dict, set, deque)) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, set):
        for item in list(value):
            if (changed := _changed(item, new, seen)) is not item:
                value.remove(item)
                value.add(changed)
        return value
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if (changed := _changed(item, new, seen)) is not item:
            value[key] = changed
    return value


def check_calls(holders: Iterable[tuple[str, nn.Module]], wrapped: Mapping[nn.Module, str]) -> None:
    """Refuse to wrap a module that is also called past its wrapper: its bound ``forward``, or a partial call, is kept.

    Args:
        holders: (dotted name, module) of all of the base's own modules.
        wrapped: those that are to be wrapped, with their names.

    Raises:
        UnsupportedError: names all of them, and where they are kept.

    """
    faults = [
        f"{wrapped[module]!r} is called by {attribute!r} of {name or 'the model itself'!r} too, which holds a call of "
        "it that no adapter reaches; keep the module itself there"
        for name, holder in holders
        for attribute, value in _own(holder)
        for module in _called(value, set())
        if module in wrapped and not _inside(holder, module)
    ]
    if faults:
        raise UnsupportedError(gather("modules that are also called past their adapters:", list(dict.fromkeys(faults))))


def _called(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    if isinstance(value, MethodType):
        if isinstance(value.__self__, nn.Module) and getattr(value, "__name__", "") in _CALLS:
            yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func,) if isinstance(value.func, nn.Module) else _called(value.func, seen)
    elif isinstance(value, (list, tuple, dict, set, frozenset, deque)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _called(item, seen)
