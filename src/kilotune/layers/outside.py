"""How a wrapper shows itself to code outside: under other names of its parts, such as those of another library.

A wrapper shows its own names where nothing else is said. What gives it others is set from above
(``layer.outside = ...``) and reads the wrapper; nothing here or in the other files of this room knows those names.
"""

from __future__ import annotations

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["Outside", "Shown"]

Named = Iterator[tuple[str, nn.Module]]


class Outside(ABC):
    """Other names for the parts of a wrapper."""

    @abstractmethod
    def attribute(self, wrapper: nn.Module, name: str) -> Any:
        """What code outside gets that asks for ``name``, which is none of the wrapper's own; AttributeError if none."""

    @abstractmethod
    def parts(self, wrapper: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules in it, by the names under which they are shown; their parameters are the wrapper's own."""

    @abstractmethod
    def names(self, wrapper: nn.Module) -> Mapping[str, str]:
        """Own name -> shown name of each of its parameters that has another, both from the wrapper."""

    @abstractmethod
    def title(self, wrapper: nn.Module) -> str:
        """What the wrapper is called where it is printed."""


class Shown(nn.Module, ABC):
    """A wrapper that may be shown under other names: in loops over its parameters and modules, and in state dicts."""

    outside: Outside | None = None

    def foreign(self, inner: nn.Module, name: str) -> Any:
        """An attribute that is not the wrapper's own: one that it is shown with, else that of what is in it."""
        if self.outside is not None:
            try:
                return self.outside.attribute(self, name)
            except AttributeError:
                pass
        return getattr(inner, name)

    def __repr__(self) -> str:
        """As of any module, with the names that are shown."""
        if self.outside is None:
            return super().__repr__()
        parts = [f"({name}): {part!r}" for name, part in self.outside.parts(self)]
        return "\n".join([f"{self.outside.title(self)}(", *(textwrap.indent(part, "  ") for part in parts), ")"])

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Named:
        """As of any module, with the names that are shown."""
        if self.outside is None:
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        for name, part in self.outside.parts(self):
            yield from part.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As of any module, with the names that are shown."""
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.outside is not None and not args:
            for own, shown in self.outside.names(self).items():
                if (key := f"{prefix}{own}") in found:
                    found[f"{prefix}{shown}"] = found.pop(key)
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.outside is not None:
            for own, shown in self.outside.names(self).items():
                if (key := f"{prefix}{shown}") in state_dict:
                    state_dict[f"{prefix}{own}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)
