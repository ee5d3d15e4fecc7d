"""PEFT's BufferDict: tensors by name that are saved with a module and are not trained."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, final

from torch import Tensor, nn

from ...errors import ConfigError, type_name

__all__ = ["BufferDict"]


@final
class BufferDict(nn.Module):
    """Buffers of a module as a dictionary; what ``torch.nn.ParameterDict`` is for parameters.

    Args:
        buffers: tensors by name.
        persistent: whether they are in the module's state.

    """

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> Tensor:
        value = self._buffers[key]
        assert value is not None
        return value

    def __setitem__(self, key: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise ConfigError(f"BufferDict[{key!r}]: expected a tensor, got {type_name(value)}")
        self.register_buffer(key, value, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._buffers.keys()

    def values(self) -> ValuesView[Tensor | None]:
        """The tensors."""
        return self._buffers.values()

    def items(self) -> ItemsView[str, Tensor | None]:
        """Names and tensors."""
        return self._buffers.items()

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Any]]) -> None:
        """Take in tensors of another dictionary, or of pairs; those of names that are there are replaced."""
        for key, value in dict(buffers.items() if isinstance(buffers, (Mapping, BufferDict)) else buffers).items():
            self[key] = value

    def pop(self, key: str) -> Tensor:
        """Take a tensor out."""
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        """Take all out."""
        for key in list(self):
            del self[key]

    def extra_repr(self) -> str:
        """A line for each tensor."""
        return "\n".join(f"({key}): {type_name(value)} {tuple(self[key].shape)}" for key, value in self.items())
